"""The trainer: steps over streams of text whose context is carried from segment to segment.

A step reads the next T tokens of B streams (`grad_accum` times over), starting from the contexts the last segment ended
with, cut off from its graph: truncated backpropagation through time. After every `checkpoint_every` steps all that decides
the next step is in `last.safetensors`, so that a run that is killed and resumed walks through the same losses, on a CPU
to the last digit.

On a GPU a step is two CUDA graphs, one that reads a segment and one that updates the weights, and the host reads nothing
back but at logs: the text lies on the GPU, losses are summed there.
"""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from newllm import checkpoint
from newllm.config import ModelConfig
from newllm.data import Segment, Streams, fingerprint
from newllm.errors import UserError
from newllm.evaluation import calibrate, evaluate
from newllm.graphs import Graphs
from newllm.model import LanguageModel, State, build_model
from newllm.noise import Noise
from newllm.run import Run
from newllm.speed import peak_flops, training_flops_per_token
from newllm.teacher import read as read_teachers
from newllm.training_config import TrainingConfig, choose_device, compute_dtype, learning_rate
from newllm.weights import Weights
from newllm_kernels import record_seams
from newllm_kernels.context_scan.seams import Seams


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Yield a list that SIGINT and SIGTERM are appended to instead of ending the process; a second one ends it at once.

    Only the main thread may handle signals; in any other the list stays empty.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains the model of one run folder. `train` is the loop; `save` and `load` are its whole state.

    train, valid: tokens (n,). spelling: S (V, K) of newllm/spelling.py, K at most config.spelling; None where that is 0.
    teachers: on the device of config, in float32; none where config.teacher_share is 0.
    """

    def __init__(
        self,
        run: Run,
        model: ModelConfig,
        config: TrainingConfig,
        train: np.ndarray,
        valid: np.ndarray,
        spelling: Tensor | None = None,
        teachers: Sequence[LanguageModel] = (),
    ) -> None:
        if (spelling is None) != (config.spelling == 0):
            got = None if spelling is None else tuple(spelling.shape)
            raise ValueError(
                f"spelling: got {got} with config.spelling {config.spelling}, wanted S (V, K) where that is not 0"
            )
        if bool(teachers) != (config.teacher_share > 0):
            raise ValueError(
                f"teachers: got {len(teachers)} with config.teacher_share {config.teacher_share}, wanted some where that is not 0"
            )
        self.run, self.config, self.valid = run, config, valid
        self.device = choose_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)  # noqa: NPY002 - the global one, whoever draws from it
        torch.manual_seed(config.seed)
        self.model = build_model(model).to(self.device)
        dtype = compute_dtype(config.precision, self.device)
        self.weights = Weights(self.model, config, dtype, spelling)
        self.forward = self.weights.computing.features
        if config.compile:
            compile_layers(self.weights.computing)
        self.optimizer = self.weights.optimizer
        self.streams = Streams(
            train, config.batch_size, config.segment, config.seed, random=config.random_segments, device=self.device
        )
        self.noise = Noise(train, model.vocab_size, config.noise, self.device) if config.noise else None
        self.advice = None
        if teachers:
            self.advice = read_teachers(
                teachers, train, config.teacher_words, dtype, config.teacher_temperature, "asking the teachers"
            )
        self.graphs = Graphs(self.device, config.cuda_graph)
        self.data = f"{fingerprint(train)}/{fingerprint(valid)}"
        self.state: State | None = None
        self.step = 0
        self._saved_at: int | None = None
        self.best_loss = math.inf
        self.seconds = 0.0  # of training, without evaluation and saving
        self._full = model.architecture != "transformer" and model.coupling == "full"
        self._seams: list[Seams] = []  # of full cells, since the last log
        self._offset = torch.zeros((), dtype=torch.int64, device=self.device)  # of the segment, for a graph to read
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._tokens, self._logged_at = 0, 0.0
        self.tokens = 0  # trained on in all
        peak = peak_flops(self.device)
        self._utilisation = peak and training_flops_per_token(model, config.segment) / peak  # times tokens/s

    def train(self, stop_after: int | None = None, max_minutes: float | None = None) -> int | None:
        """Train to the last step, or for `stop_after` steps, or until `max_minutes` have passed since this call. A checkpoint
        is on the disk whenever this returns.

        Returns the number of the signal that ended it early, or None. Raises UserError where the loss is no number or
        the run folder cannot be written to; the last good checkpoint stands then.
        """
        end = self.config.steps if stop_after is None else min(self.config.steps, self.step + stop_after)
        deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True)
        config = self.config
        self.weights.computing.train()
        # How full cells go through time; calls inside CUDA graphs go in order and tell nothing.
        watching = record_seams() if self._full else nullcontext([])
        with catching_signals() as caught, bar, watching as self._seams:
            while self.step < end and not caught and time.monotonic() < deadline:
                started = time.perf_counter()
                due = False
                while not due and self.step < end and not caught and time.monotonic() < deadline:
                    self._train_step()
                    bar.update()
                    due = any(
                        self.step % n == 0 for n in (config.log_every, config.eval_every, config.checkpoint_every)
                    )
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # the host is ahead; what it has launched counts
                self.seconds += time.perf_counter() - started
                if self.step % config.log_every == 0 or self.step == config.steps:
                    self._log(bar)
                if self.step % config.eval_every == 0 or self.step == config.steps:
                    self._evaluate(bar)
                if self.step % config.checkpoint_every == 0:
                    self.save()
            if self.step == self.config.steps and not self.run.best_file.exists():  # fewer steps since it was stopped
                self._evaluate(bar)
            if self._saved_at != self.step:
                self.save()
        return caught[0] if caught else None

    def _train_step(self) -> None:
        lr, length = learning_rate(self.config, self.step), 0
        averaged = self.weights.averages(self.step)
        with self.graphs.stream():
            for n in range(self.config.grad_accum):
                segment = self.streams.next()
                self._offset.fill_(segment.offset)
                self.graphs.run(
                    (segment.length, segment.fresh, n == 0), lambda s=segment, n=n: self._segment(s, n == 0)
                )
                length += segment.length
            # A shorter segment gives a noisier gradient, and gets a shorter step (Merity et al., 2018).
            self.weights.set_rates(lr * length / (self.config.grad_accum * self.config.segment), self.step)
            self.graphs.run(averaged, lambda: self.weights.update(averaged))
        self._tokens += self.config.batch_size * length
        self.tokens += self.config.batch_size * length
        self.step += 1

    def _segment(self, segment: Segment, first: bool) -> None:
        """Forward and backward of one segment. All that differs between two with one length lies in tensors."""
        inputs, targets = self.streams.window(self._offset, segment.length)  # (B, T) each
        if self.noise is not None:
            inputs, targets = self.noise(inputs, targets)
        carries = self.model.carries_context
        # The start of a text differs from all that follows in what has a gradient: once an epoch, not worth compiling for.
        with self.uncompiled() if carries and segment.fresh else nullcontext():
            x, state = self.forward(inputs, None if segment.fresh else self._begin())  # (B, T, F)
        advice = None
        if self.advice is not None:
            advice = self.advice.at(self.streams.positions(self._offset, segment.length), self.config.teacher_share)
        nll = self.weights.computing.nll(x, targets, advice)  # (B, T)
        objective = nll.mean() + self._penalties(x)
        (objective / self.config.grad_accum).backward()
        self.weights.collect_gradients(first)
        if state := self.model.carried(state):
            self._carry(state)
        self._loss_sum += nll.detach().sum()

    def _penalties(self, x: Tensor) -> Tensor | float:
        """AR and TAR of features x (B, T, F); Merity, McCann and Socher, "Revisiting activation regularization" (2017)."""
        penalty: Tensor | float = 0.0
        if self.config.activation_penalty:
            penalty = penalty + self.config.activation_penalty * x.float().square().mean()
        if self.config.change_penalty and x.shape[1] > 1:
            penalty = penalty + self.config.change_penalty * (x[:, 1:] - x[:, :-1]).float().square().mean()
        return penalty

    def _begin(self) -> State | None:
        """What a segment in the middle of the text starts from: what the last one left, in some streams the learned start.
        Else few texts of a training begin with that, and a model does not learn how to begin one."""
        if self.state is None or self.config.restart == 0:
            return self.state
        rows = torch.rand(self.config.batch_size, device=self.device) < self.config.restart
        start = self.weights.computing.initial_state(self.config.batch_size, self.device)
        return {
            name: torch.where(rows.view(-1, *[1] * (value.dim() - 1)), start[name], value)
            for name, value in self.state.items()
        }

    def _carry(self, state: State) -> None:
        """Keep the contexts that the next segment starts from, cut off from their graph, in the same memory every time."""
        if self.state is None:
            self.state = {name: torch.empty_like(value) for name, value in state.items()}
        for name, value in state.items():
            self.state[name].copy_(value.detach())

    def _check_finite(self) -> None:
        """Raise UserError where a loss since the last log was no number, or the gradient that made the present weights."""
        for name, value in (("loss", self._loss_sum.item()), ("gradient norm", self.weights.grad_norm.item())):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} is {value} at step {self.step}: training has diverged; the checkpoint before it stands."
                    " Lower --lr or --clip"
                )

    def _log(self, bar: tqdm) -> None:
        """The loss that is logged is the mean since the last log."""
        self._check_finite()
        loss = self._loss_sum.item() / self._tokens
        tokens_per_s = self._tokens / max(self.seconds - self._logged_at, 1e-9)
        record = {
            "step": self.step,
            "loss": loss,
            "lr": learning_rate(self.config, self.step - 1),
            "grad_norm": self.weights.grad_norm.item(),
            "tokens": self.tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "elapsed_s": round(self.seconds, 3),
        }
        if self._full:
            record |= passes(self._seams)
            self._seams.clear()
        if self._utilisation is not None:
            record["mfu"] = round(self._utilisation * tokens_per_s, 4)  # of the GPU's matrix products
        self.run.append_metrics(record)
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s")
        self._loss_sum.zero_()
        self._tokens, self._logged_at = 0, self.seconds

    def _evaluate(self, bar: tqdm) -> None:
        self._check_finite()
        before = len(self._seams)
        model = self.weights.evaluated(self.step)
        with self.uncompiled():
            if getattr(model, "recall", None) is None:
                score = evaluate(model, self.valid, limit=self.config.eval_tokens)
            else:
                score = calibrate(model, self.valid, limit=self.config.eval_tokens)
                self.weights.set_shares(model.recall.shares)
        record = {"step": self.step, "valid_loss": score.loss, "valid_perplexity": score.perplexity}
        if self._full:
            record |= {f"valid_{name}": value for name, value in passes(self._seams[before:]).items()}
            del self._seams[before:]
        self.run.append_metrics(record)
        line = f"step {self.step:>6}  validation loss {score.loss:.4f}  perplexity {score.perplexity:,.2f}"
        if score.loss < self.best_loss:
            line += "  (best)"
            self.best_loss = score.loss
            # As it was evaluated: of a run in bfloat16 half the bytes, and nothing lost.
            weights = checkpoint.prefixed("model", checkpoint.model_tensors(model))
            checkpoint.save(self.run.best_file, weights, {"step": self.step, "valid_loss": score.loss})
        self.weights.refresh_copy()
        bar.write(line)

    def uncompiled(self) -> AbstractContextManager[object]:
        """What is compiled is compiled for training: the shapes of evaluation would each cost as long again."""
        return torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()

    def save(self) -> None:
        """Write last.safetensors: all that decides how training goes on."""
        self._check_finite()  # a diverged model does not take the place of a good one
        rng_tensors, rng_info = checkpoint.rng_state()
        tensors = (
            checkpoint.prefixed("model", checkpoint.model_tensors(self.model))
            | checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(self.optimizer))
            | checkpoint.prefixed("average", self._average_tensors())
            | checkpoint.prefixed("spelling", self.weights.spelling_tensors())
            | checkpoint.prefixed("state", self.state or {})
            | checkpoint.prefixed("rng", rng_tensors)
        )
        info = {
            "step": self.step,
            "streams": self.streams.state_dict(),
            "best_loss": self.best_loss if self.best_loss < math.inf else None,  # JSON has no infinity
            "seconds": self.seconds,
            "logged_at": self._logged_at,
            "loss_sum": self._loss_sum.item(),
            "tokens": self.tokens,
            "tokens_since_log": self._tokens,
            "data": self.data,
            "rng": rng_info,
        }
        checkpoint.save(self.run.last_file, tensors, info)
        self._saved_at = self.step

    def load(self) -> None:
        """Go back to last.safetensors, and cut the metrics back to its step. Raises UserError where the data has changed."""
        tensors, info = checkpoint.load(self.run.last_file)
        if "streams" not in info:
            raise UserError(f"{self.run.last_file}: holds weights, but not the state of a training that could go on")
        if info["data"] != self.data:
            raise UserError(
                f"{self.run.path}: the data is not what this run was trained on (tokens {info['data']}, now {self.data});"
                " put it back to resume"
            )
        checkpoint.load_model(self.model, checkpoint.with_prefix("model", tensors), self.run.last_file)
        if self.weights.average is not None:
            checkpoint.load_model(self.weights.average, checkpoint.with_prefix("average", tensors), self.run.last_file)
        self.weights.load_spelling(checkpoint.with_prefix("spelling", tensors))
        self.weights.refresh_copy()
        checkpoint.load_optimizer(self.optimizer, checkpoint.with_prefix("optimizer", tensors))
        state = checkpoint.with_prefix("state", tensors)
        self.state = {name: tensor.to(self.device) for name, tensor in state.items()} or None
        self.step = self._saved_at = info["step"]
        self.best_loss = math.inf if info["best_loss"] is None else info["best_loss"]
        self.seconds, self._logged_at = info["seconds"], info["logged_at"]
        self.tokens, self._tokens = info["tokens"], info["tokens_since_log"]
        self._loss_sum.fill_(info["loss_sum"])
        self.streams.load_state_dict(info["streams"])
        self.run.cut_metrics(self.step)
        checkpoint.set_rng_state(checkpoint.with_prefix("rng", tensors), info["rng"])

    def start_from(self, tensors: checkpoint.Tensors) -> None:
        """Take over weights, before the first step."""
        for model in (self.model, self.weights.average):
            if model is not None:
                model.load_state_dict(tensors, strict=False)  # of tied ones the file has one
        self.weights.refresh_copy()

    def _average_tensors(self) -> checkpoint.Tensors:
        return {} if self.weights.average is None else checkpoint.model_tensors(self.weights.average)


def passes(seams: list[Seams]) -> dict[str, float]:
    """Of full cells: the most passes over chunks of time that a call took, forward or backward (1: in order of time, as inside
    CUDA graphs, which tell nothing), and the largest mismatch left at a seam."""
    return {
        "passes": max((one.passes for one in seams), default=1),
        "seam_mismatch": max((one.mismatch for one in seams), default=0.0),
    }


def compile_layers(model: LanguageModel) -> None:
    """torch.compile every layer by itself: one that is compiled serves all that look like it, in a fraction of the time that
    the whole model takes. A model of one cell is compiled whole."""
    layers = getattr(model, "blocks", None)
    for module in [model.cell] if layers is None else layers:
        module.compile()
