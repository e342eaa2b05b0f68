"""Environments for tests, in a module that imports nothing heavy: each process that plays one loads it."""

import os
import random
import subprocess
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_sapo.environments import Observation

QUESTION = "Are you sure? <|im_end|>"
"""With the name of a special token, which must stay plain text."""


class AskTwice:
    """Asks until the third turn, which it rewards."""

    def reset(self, example):
        self.seen, self.example = [], example

    def step(self, response):
        self.seen.append(response)
        last = len(self.seen) == 3
        return Observation(QUESTION, done=last, reward=1.0 if last else 0.25)


class EndsEarly(AskTwice):
    """At once, for one row."""

    def step(self, response):
        return Observation(done=True) if self.example.id == "e2" else super().step(response)


class Painter(AskTwice):
    """Shows one or two images of other sizes with each question, and says how the model sees all so far."""

    def step(self, response):
        answer = super().step(response)
        count = 1 + (len(response) + len(self.seen)) % 2
        sides = [(24 + 16 * number + len(response) % 40, 40) for number in range(count)]
        images = tuple(Image.new("RGB", size, (20 * count, 90, len(response) % 256)) for size in sides)
        text = ("Look: <image>" * count if len(self.seen) == 1 else "Again:") + f" {len(response.resized)}"
        return Observation(text, images=images, done=answer.done, info={"shown": count})


class Mute(AskTwice):
    def step(self, response):
        return "go on"


class NoPicture(AskTwice):
    def step(self, response):
        return Observation("Look at this", images=(object(),))


class Faulty(AskTwice):
    def step(self, response):
        raise KeyError("score")


class Unlucky(AskTwice):
    def reset(self, example):
        raise OSError("no simulator")


class Endless(AskTwice):
    def step(self, response):
        return Observation("again", reward=float("nan"))


class Unready:
    def reset(self, example):
        pass


class Moody(AskTwice):
    """By the row: answers, hangs, raises, ends its process."""

    def step(self, response):
        if len(self.seen) == 1:
            if self.example.id == "e1":
                time.sleep(60)
            if self.example.id == "e2":
                raise RuntimeError("a bad day")
            if self.example.id == "e3":
                os._exit(3)
        return super().step(response)


class Echo(AskTwice):
    """Asks with the turn itself, to read in a test what it got."""

    def step(self, response):
        return Observation(repr(str(response)), done=len(response) % 2 == 0)


class Statistician(AskTwice):
    """Answers with numbers and texts of other kinds."""

    def step(self, response):
        info = {"share": np.float64(0.5), "count": np.int64(2), "flag": np.bool_(True), "name": "x"}
        info |= {"bad": float("nan"), "whole": True, "many": np.ones(3)}
        return Observation(Words("more"), done=len(self.seen) > 0, reward=np.float32(0.5), info=info)


class Words(str):
    """A text of a class of its own."""


class Leaving(AskTwice):
    """Raises in every second episode of a process, and leaves a mark there."""

    marks = 0

    def step(self, response):
        if Leaving.marks:
            return Observation("marked", done=True, info={"marked": 1})
        if self.example.id == "e0":
            Leaving.marks += 1
            raise RuntimeError("left a mark")
        return super().step(response)


class Parent(AskTwice):
    """Starts a process of its own and hangs."""

    def step(self, response):
        child = subprocess.Popen(["sleep", "600"])
        Path(self.example.columns["file"]).write_text(str(child.pid))
        time.sleep(600)


class Rambling(AskTwice):
    """Any number of turns, images and words, by its own random numbers."""

    def reset(self, example):
        super().reset(example)
        self.turns = random.randint(1, 4)

    def step(self, response):
        self.turns -= 1
        sizes = [(random.randint(8, 150), random.randint(8, 150)) for _ in range(random.choice((0, 0, 1, 2)))]
        noise = (np.random.randint(0, 256, (*size, 3), dtype=np.uint8) for size in sizes)
        images = tuple(map(Image.fromarray, noise))
        text = " ".join(
            random.choices(("look", "<image>", "7", "<|im_end|>", "\n", ""), k=random.randint(0, 5))
        )
        return Observation(text, images=images, done=not self.turns, reward=random.random())
