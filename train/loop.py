"""The training loop of every task."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from train import devices, runs
from train.checkpoints import CheckpointError, Checkpoints, is_key, save_tree
from train.config import Config, FlagError
from train.process import Interrupted, deferred_signals
from train.updates import LossFn, Scalars, State, Updates, checked, compiled, make_updates


class Trained(NamedTuple):
    """What comes out of a run.

    Attributes:
      model: the trained model, on the first device.
      figures: `steps`, `train_seconds` (updates alone), `compile_seconds`, `steps_per_second`,
        `examples_per_second` where the size of a batch is known, and `loss` (mean over the last
        line of metrics). Seconds are those of all processes that it took.
      history: by step what `evaluate` returned, as NumPy arrays.
    """

    model: nnx.Module
    figures: Scalars
    history: dict[int, dict[str, np.ndarray]]


def build(make_model: Callable[..., nnx.Module], config: Config, *inputs: Any) -> nnx.Module:
    """Makes a model, `make_model(config, *inputs)`, if there is memory to train it.

    Raises:
      FlagError: there is not, or flags contradict each other.
    """
    try:
        shapes = nnx.eval_shape(lambda: make_model(config, *inputs))
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise FlagError(f"the model: {error}") from error
    # Parameters, their gradient, and two moments.
    devices.check_fits("training the model", 4 * devices.num_bytes(nnx.state(shapes, nnx.Param)))
    return make_model(config, *inputs)


def train(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    data: Any,
    *,
    config: Config,
    key: jax.Array,
    steps: int,
    workdir: pathlib.Path,
    inputs: tuple = (),
    batch_size: int | None = None,
    average: float | None = None,
    log_every: int = 50,
    evaluate: Callable[[nnx.Module, int], Scalars] | None = None,
    evaluate_every: int = 500,
    best: Callable[[Scalars], float] | None = None,
    settled: Callable[[int], bool] = lambda step: True,
) -> Trained:
    """Trains a model; Python runs only once in `log_every` steps.

    Writes to `workdir` as it goes, see `runs`. Where a run began there before, it goes on from the
    last checkpoint, and ends as if it had never been interrupted, bit by bit; where it is finished,
    or `--mode=eval`, nothing is trained. Under `launcher.launch`, SIGINT, SIGTERM and SIGHUP end
    the loop after the steps under way, with everything saved; a second signal ends it at once.

    Args:
      model: its `nnx.Param` are trained; all other state, random streams included, is carried from
        step to step. The model itself is left as it is.
      optimizer: from Optax; learning-rate schedules, clipping and the like belong in here.
      loss_fn: `(model, key, data) -> (loss, metrics)`, the loss a scalar and the metrics a dict of
        scalars, both logged as means over `log_every` steps. It draws its own batch from `data`
        with `key`, which is new in each step, and passes it through `devices.shard`.
      data: a tree of arrays, put on every device once.
      config: of the run; says when to save, and on which devices to run.
      key: PRNG key. With the number of the step, it decides the batch.
      steps: number of updates.
      workdir: folder to write to; made if it is missing.
      inputs: what `make_model` of the task took beside the config, for `runs.load_run`.
      batch_size: examples in an update; decides over how many devices they are divided.
      average: if given, the decay in [0, 1) of an exponential moving average of the parameters (a
        plain mean until there are enough of them). The averaged parameters are the ones that are
        evaluated, saved and returned.
      log_every: steps per line of metrics. Checkpoints are taken where a line is written.
      evaluate: `(model, step) -> results`, called before the first step, every `evaluate_every`
        steps and after the last. Scalars are logged and printed; arrays are kept, to draw from.
      evaluate_every: see `evaluate`.
      best: of the scalars of an evaluation, what is larger the better the model; a checkpoint of
        the best is kept.
      settled: whether the parameters after so many steps are a model. At others, which an optimizer
        uses to try something out, there is no line, evaluation or checkpoint: the next step has it.

    Raises:
      ValueError: steps is less than 1.
      FlagError: the folder has another run or is in use, or memory or devices do not suffice.
      CheckpointError: a checkpoint can be neither read nor written.
      FloatingPointError: a loss, gradient, parameter or figure is not finite; says which one and
        when. The state before is saved.
      Interrupted: a signal; says how far it came.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, want at least 1")
    run = _Run(
        *nnx.split(model, nnx.Param, ...),
        optimizer=optimizer,
        loss_fn=loss_fn,
        data=data,
        key=key,
        mesh=devices.make_mesh(config.mesh_shape(), batch_size),
        steps=steps,
        average=average,
        config=config,
        workdir=workdir,
        evaluate=evaluate,
        best=best,
    )
    if not runs.is_run(workdir):
        run.compiled()  # What does not fit leaves no folder behind.
    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.owned(workdir))
        signals = stack.enter_context(deferred_signals())
        runs.begin(workdir, config, inputs)
        saved = Checkpoints(
            workdir / "checkpoints", keep=config.keep, read_only=config.mode == "eval"
        )
        stack.callback(saved.close)
        is_new = run.take_up(saved)
        stack.enter_context(_telling_what_is_saved(saved))
        if run.step >= steps or config.mode == "eval":
            _say(f"{workdir} is at step {run.step}: nothing to train, its figures are made anew")
            model = run.evaluated()
            if config.mode == "train" and not (workdir / "params").is_dir():
                _save_params(workdir, model)
            return Trained(model, run.figures(batch_size), run.history)

        _say(f"writing to {workdir}" if is_new else f"continuing {workdir} from step {run.step}")
        run.compiled()
        write = stack.enter_context(runs.metric_writer(workdir, -1 if is_new else run.step))
        bar = stack.enter_context(
            tqdm(total=steps, initial=run.step, unit="step", disable=jax.process_index() > 0)
        )
        if is_new and evaluate is not None:
            write(0, run.assess(bar))
        intervals = [log_every] if evaluate is None else [log_every, evaluate_every]
        pacemaker = _Pacemaker(config, run.step)
        tracing = _traces(config, workdir)
        while run.step < steps and not devices.agree(bool(signals)):
            begin = run.step
            stop = min(steps, *(_next_multiple(begin, interval) for interval in intervals))
            while stop < steps and not settled(stop):
                stop += 1
            bar.update(stop - begin)
            with next(tracing):
                row = run.advance(stop, saved)
            bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
            is_due = stop == steps or stop >= _next_multiple(begin, evaluate_every)
            if evaluate is not None and is_due:
                row |= run.assess(bar)
            write(stop, row)
            is_best = (run.info["best"] or {}).get("step") == stop
            if pacemaker.is_due(stop, is_best):
                run.save(saved, may_fail=True)
        run.save(saved)
        model = run.evaluated()
        _save_params(workdir, model)
        saved.wait()
    if run.step < steps:
        raise Interrupted(
            f"interrupted after step {run.step} of {steps}, which is saved",
            signals[0] if signals else signal.SIGTERM,
        )
    return Trained(model, run.figures(batch_size), run.history)


@dataclasses.dataclass
class _Run:
    """A run between two lines of metrics."""

    graphdef: nnx.GraphDef
    params: nnx.State
    rest: nnx.State
    optimizer: optax.GradientTransformation
    loss_fn: LossFn
    data: Any
    key: jax.Array
    mesh: jax.sharding.Mesh
    steps: int
    average: float | None
    config: Config
    workdir: pathlib.Path
    evaluate: Callable[[nnx.Module, int], Scalars] | None
    best: Callable[[Scalars], float] | None

    def __post_init__(self):
        self.data, self.key = devices.replicate(self.mesh, (self.data, self.key))
        self.state = self.initial()
        self.template = jax.tree.map(_outline, self.state)
        self.step = 0
        self.history = {}
        self.info = {"train_seconds": 0.0, "compile_seconds": 0.0, "loss": None, "best": None}
        self._updates = None

    def initial(self) -> State:
        """The state before the first step."""
        # Updates take their state: nothing else may own its arrays, nor may it hold one twice.
        params, rest = _copy((self.params, self.rest))
        state = State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            rest=rest,
            opt_state=self.optimizer.init(params),
            average=None if self.average is None else _copy(params),
        )
        return devices.place(self.mesh, state)

    def take_up(self, saved: Checkpoints) -> bool:
        """Goes on from the last checkpoint; whether there is none, so that the run is new."""
        restored = saved.restore(self.template)
        if restored is None:
            if self.config.mode == "eval":
                raise FlagError(f"--mode=eval: no checkpoint in {self.workdir}")
            return True
        self.step, self.state, self.info = restored
        saved.best = (self.info["best"] or {}).get("step")
        self.history = runs.load_evaluations(self.workdir, self.step)
        return False

    def compiled(self) -> Updates:
        """The function that updates the state; compiled once."""
        if self._updates is None:
            began = time.perf_counter()
            updates = make_updates(self.graphdef, self.optimizer, self.loss_fn, self.average)
            self._updates = compiled(updates, self.mesh, self.template, self.key, self.data)
            self._compile_seconds = time.perf_counter() - began
        return self._updates

    def advance(self, stop: int, saved: Checkpoints) -> Scalars:
        """Takes the steps up to `stop`; the means of their scalars."""
        began = time.perf_counter()
        self.state, *results = self.compiled()(self.state, np.int32(stop), self.key, self.data)
        done, (sums, loss, finite) = jax.device_get((self.state.step, results))
        self.info["train_seconds"] += time.perf_counter() - began
        if not finite.all():
            self._stop_before(int(done), loss, finite, saved)
        row = {name: float(total) / (stop - self.step) for name, total in sums.items()}
        self.info["loss"] = row["loss"]
        self.step = stop
        return row

    def _stop_before(self, bad: int, loss, finite, saved: Checkpoints) -> NoReturn:
        """Makes and saves the state before a step that went wrong, and says what did."""
        saved.wait()
        restored = saved.restore(self.template)
        state = self.initial() if restored is None else restored.tree
        self.state = self.compiled()(state, np.int32(bad - 1), self.key, self.data)[0]
        self.step = bad - 1
        self.save(saved)
        saved.wait()
        name = checked(self.params)[int(np.argmin(finite))]
        what = f"the loss is {loss}" if name == "loss" else f"the {name} is not finite"
        raise FloatingPointError(
            f"{what} at step {bad} of {self.steps}; "
            f"the state of step {bad - 1} is saved in {self.workdir}"
        )

    def assess(self, bar: tqdm) -> Scalars:
        """Evaluates, and keeps what comes out; the scalars of it."""
        model = self.evaluated()
        results = self.evaluate(model, self.step)
        results = {name: np.asarray(x) for name, x in results.items()}
        figures = {name: float(x) for name, x in results.items() if x.ndim == 0}
        for name, figure in figures.items():
            if not math.isfinite(figure):
                _save_params(self.workdir, model)
                raise FloatingPointError(
                    f"{name} is {figure} at step {self.step} of {self.steps}; "
                    f"the model is in {self.workdir / 'params'}"
                )
        self.history[self.step] = results
        runs.save_evaluation(self.workdir, self.step, results)
        if self.best is not None and self.step > 0:
            score = float(self.best(figures))
            if self.info["best"] is None or score > self.info["best"]["score"]:
                self.info["best"] = {"step": self.step, "score": score}
        if figures:
            texts = (f"{name} {figure:.4g}" for name, figure in figures.items())
            bar.write("  ".join([f"step {self.step}", *texts]))
        return figures

    def evaluated(self) -> nnx.Module:
        """The model to evaluate, on the first device."""
        state = self.state
        params = state.params if state.average is None else state.average
        return nnx.merge(self.graphdef, *devices.gather((params, state.rest)))

    def save(self, saved: Checkpoints, *, may_fail: bool = False) -> None:
        """Saves the state; on a disk that is full for now, the run may go on."""
        saved.best = (self.info["best"] or {}).get("step")
        try:
            saved.save(self.step, _copy(self.state), self._figures_so_far())
        except CheckpointError as error:
            if not may_fail:
                raise
            print(f"could not save: {error}", file=sys.stderr, flush=True)

    def figures(self, batch_size: int | None) -> Scalars:
        """What is to be said of the run."""
        info = self._figures_so_far()
        seconds = info["train_seconds"]
        rate = self.step / seconds if seconds else None
        names = ("train_seconds", "compile_seconds", "loss")
        figures = {"steps": self.step, **{name: info[name] for name in names}}
        figures["steps_per_second"] = rate
        if batch_size is not None:
            figures["examples_per_second"] = rate and rate * batch_size
        return figures

    def _figures_so_far(self) -> dict[str, Any]:
        seconds = self.info["compile_seconds"] + (self._compile_seconds if self._updates else 0.0)
        return self.info | {"compile_seconds": seconds}


class _Pacemaker:
    """Says when to save."""

    def __init__(self, config: Config, step: int):
        self._steps, self._seconds = config.checkpoint_interval()
        self._last = step, time.monotonic()

    def is_due(self, step: int, is_best: bool) -> bool:
        """Whether a checkpoint is to be saved at a step, and with it the next wait begins."""
        last_step, last_time = self._last
        late = devices.agree(time.monotonic() - last_time >= self._seconds)
        due = is_best or late or step - last_step >= self._steps
        if due:
            self._last = step, time.monotonic()
        return due


def _save_params(workdir: pathlib.Path, model: nnx.Module) -> None:
    """Saves all of a model's state but its random streams, whole or not at all."""
    state = nnx.state(model, nnx.Not(nnx.RngState))
    save_tree(workdir / "params", jax.tree.map(np.asarray, state))


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def _outline(x):
    """What `Checkpoints.restore` has to know of an array."""
    return jnp.copy(x) if is_key(x) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _next_multiple(step: int, interval: int) -> int:
    return (step // interval + 1) * interval


def _traces(config: Config, workdir: pathlib.Path) -> Iterator[contextlib.AbstractContextManager]:
    """For each line of metrics, what surrounds its steps: those of the second are traced."""
    yield contextlib.nullcontext()
    if config.profile:
        yield jax.profiler.trace(str(workdir / "profile"), create_perfetto_trace=True)
    while True:
        yield contextlib.nullcontext()


@contextlib.contextmanager
def _telling_what_is_saved(saved: Checkpoints) -> Iterator[None]:
    """Adds to an error of files which model there is nevertheless."""
    try:
        yield
    except (OSError, CheckpointError) as error:
        place = getattr(error, "filename", None) or saved.folder.parent
        text = f"{error.strerror}: {place}" if isinstance(error, OSError) else error
        steps = saved.steps()
        model = f"the model of step {steps[0]} is {saved.folder / str(steps[0])}"
        raise CheckpointError(f"{text}; {model if steps else 'no model is saved'}") from error
