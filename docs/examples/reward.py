"""A reward that looks at the picture: is the named colour the one that covers most of it?

reward:
  parts: [{name: docs/examples/reward.py:main_colour, args: {partly: 0.3}}]
"""

from vlm_sapo.rewards.verifiers import marked_answer

COLOURS = {"red": (230, 40, 40), "green": (40, 150, 70), "blue": (40, 90, 220), "yellow": (250, 210, 30)}


def main_colour(response, example, partly=0.3):
    """1 for the colour with most pixels, `partly` for another one that is there, else 0."""
    counts = dict.fromkeys(COLOURS, 0)
    image = example.images[0].convert("RGB")
    for count, pixel in image.getcolors(maxcolors=image.width * image.height):
        if max(pixel) - min(pixel) > 40:  # grey is background
            counts[min(COLOURS, key=lambda name: distance(pixel, COLOURS[name]))] += count
    answer = (marked_answer(response) or "").strip().lower()
    if answer == max(counts, key=counts.get):
        return 1.0
    return partly if counts.get(answer) else 0.0


def distance(one, other):
    """Squared distance of two colours."""
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
