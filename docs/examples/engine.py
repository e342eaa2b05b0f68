"""An engine of your own: the policy's own sampling, with a note of how often each answer was sampled.

rollout:
  engine: {type: own, function: docs/examples/engine.py:counting, args: {path: counts.json},
           policy_modules: true}
"""

import json
from collections import Counter
from pathlib import Path

from vlm_sapo.rollout.hf import HfEngine


class CountingEngine(HfEngine):
    """Every engine has `sync`, `generate` and `close` (vlm_sapo/rollout/engine.py); this one is `hf` with a
    step added."""

    path: Path

    def generate(self, contexts, sampling):
        groups = super().generate(contexts, sampling)
        counts = Counter(response.text for responses in groups for response in responses)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(dict(counts.most_common(20))))
        return groups


def counting(needs, path):
    """`needs` is what an engine is built for (vlm_sapo/rollout/engine.py)."""
    engine = CountingEngine(
        needs.vlm,
        sequences_per_batch=needs.sequences_per_batch,
        autocast=needs.autocast,
        with_full_params=needs.with_full_params,
        warn=needs.warn,
        experts=needs.experts,
    )
    engine.path = Path(path)
    return engine
