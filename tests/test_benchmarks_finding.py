import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

from absl import app

from benchmarks import finding
from train import canvases, glimpse, updates

NAME = (
    "model=find canvas=12 digit_size=8 patch_size=3 num_patches=2 coarseness=2 window=6 "
    "score_hidden=4 reach=1 candidates=3 hidden=8 batch_size=4 steps=2"
)


def test_flags_that_cannot_be_used_are_named():
    with pytest.raises(app.UsageError, match="model=find canvas=97: --coarseness must divide"):
        finding.Contest("model=find canvas=97", 1)
    with pytest.raises(app.UsageError, match="--candidates: want at most the 9 cells"):
        finding._check("model=find canvas=18 candidates=4", [4, 10])


@pytest.mark.slow
def test_each_of_the_seeds_is_the_run_of_that_seed(monkeypatch):
    monkeypatch.setattr(glimpse, "NUM_VALIDATION", 1)
    monkeypatch.setattr(canvases, "MIN_CANVASES", 1)
    contest = finding.Contest(NAME, 2)
    alone = jax.tree.map(lambda x: jnp.copy(x[1]), contest.state)
    contest.compile()
    contest.compile_evaluation()
    result = finding.run(contest)
    loss_fn = functools.partial(glimpse.loss_fn, contest.config)
    step = updates.make_updates(contest.graphdef, contest.optimizer, loss_fn, 0.999)
    key = jax.random.split(jax.random.key(1), 4)[0]
    want = jax.jit(step)(alone, np.int32(2), key, jax.device_put(contest.dataset.train))[0]
    got = jax.tree.map(lambda x: x[1], contest.state)
    pairs = zip(jax.tree.leaves(got.average), jax.tree.leaves(want.average), strict=True)
    alike = [np.isclose(x, y, rtol=1e-3, atol=1e-5).ravel() for x, y in pairs]
    # A gradient of nothing but rounding may have either sign, which is all that Adam asks for.
    assert np.concatenate(alike).mean() > 0.99
    assert len(result["error"]) == 2 and all(0 <= error <= 1 for error in result["error"])
    assert contest.evaluator("validation", canvases.Size(14, 1), num_candidates=5)() != []
