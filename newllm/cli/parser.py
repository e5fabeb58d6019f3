"""What the command line understands. Imports nothing heavy, so that --help and typing errors answer at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import newllm

# Options of the model: flag, field of ModelConfig, type or choices, help.
MODEL_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("--architecture", "architecture", ("newllm", "classic", "transformer"), "kind of model"),
    ("--embed-dim", "embed_dim", int, "E, width of embeddings and of the residual stream"),
    ("--hidden-dim", "hidden_dim", int, "H, width of the network that computes the gates"),
    ("--context-dim", "context_dim", int, "D, width of a context vector"),
    ("--recall", "recall", int, "entries of each table of what followed the last 1, 2 and 3 tokens"),
    ("--recall-dropout", "recall_dropout", float, "of recalled words among the inputs"),
    ("--layers", "num_layers", int, "layers"),
    ("--ffn-dim", "ffn_dim", int, "F, inner width of the feed-forward networks"),
    ("--fnn-layers", "fnn_layers", int, "linear layers between input and gates"),
    ("--activation", "activation", ("relu", "gelu", "silu", "tanh"), "of those layers"),
    ("--coupling", "coupling", ("none", "hops", "full"), "what the gates see of the context"),
    ("--hops", "hops", int, "K of coupling hops (implies it)"),
    ("--norm", "norm", ("state", "output", "none"), "LayerNorm in the loop, on what is read out, or none"),
    ("--clamp", "clamp", float, "bound of the normalised context"),
    ("--dropout", "dropout", float, "of what layers add to the residual stream"),
    ("--input-dropout", "input_dropout", float, "of embedded tokens (default: as --dropout)"),
    ("--output-dropout", "output_dropout", float, "of what the output matrix reads"),
    ("--embed-dropout", "embed_dropout", float, "of whole words of the vocabulary"),
    (
        "--context-init",
        "context_init",
        float,
        "scale of the first weights with which gates read the context (default: 1)",
    ),
    (
        "--forget-init",
        "forget_init",
        float,
        "forget biases begin spread from 0 to this (4: half-lives of up to 38 steps)",
    ),
    (
        "--input-init",
        "input_init",
        float,
        "input biases begin as minus this times the forget biases (1: long memories begin quiet)",
    ),
    ("--recurrent-dropout", "recurrent_dropout", float, "of weights between the last context and the gates"),
    ("--locked-dropout", "locked_dropout", bool, "drop the same features at every step of a segment"),
    ("--softmaxes", "softmaxes", int, "of the mixture that gives the next token"),
    ("--tie-embeddings", "tie_embeddings", bool, "the output matrix is the embedding"),
    ("--heads", "num_heads", int, "attention heads (Transformer)"),
    ("--max-seq-len", "max_seq_len", int, "attention window in tokens (Transformer)"),
)

# Options of training: flag, field of TrainingConfig, type or choices, help. Defaults are the preset's.
TRAINING_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("--steps", "steps", int, "optimizer steps"),
    ("--batch-size", "batch_size", int, "B, streams of text read side by side"),
    ("--segment", "segment", int, "T, tokens of a stream per forward pass; the context is carried on"),
    ("--random-segments", "random_segments", bool, "draw lengths from T/2, 7T/8, T and 9T/8"),
    ("--restart", "restart", float, "probability that a stream begins a segment without context, as new texts do"),
    ("--grad-accum", "grad_accum", int, "segments per optimizer step"),
    (
        "--optimizer",
        "optimizer",
        ("adamw", "muon", "sgd"),
        "muon: for matrices between embedding and output, AdamW for all else",
    ),
    ("--lr", "lr", float, "peak learning rate"),
    ("--min-lr", "min_lr", float, "learning rate at the end, as a fraction of --lr"),
    ("--warmup", "warmup", int, "steps of linear warm-up"),
    ("--schedule", "schedule", ("cosine", "linear", "constant"), "of the learning rate after the warm-up"),
    ("--weight-decay", "weight_decay", float, "on matrices only"),
    (
        "--spelling",
        "spelling",
        int,
        "features of spelling, at most, that tokens share in their embeddings (two products of V x N x E a step)",
    ),
    ("--noise", "noise", float, "share of words replaced by others, weighted as Kneser-Ney smoothing does"),
    (
        "--teacher-share",
        "teacher_share",
        float,
        "of the loss that is what teachers expect (default with --teacher: 0.5)",
    ),
    ("--teacher-words", "teacher_words", int, "the likeliest that teachers are asked for at each token (default: 256)"),
    ("--teacher-temperature", "teacher_temperature", float, "what teachers' logits are divided by (default: 1)"),
    ("--beta1", "beta1", float, "AdamW's, or the momentum of sgd"),
    ("--beta2", "beta2", float, "AdamW's"),
    ("--clip", "clip", float, "norm that gradients are clipped to"),
    ("--average", "average", float, "evaluate a running average of the weights: its decay; 1: their plain mean"),
    ("--average-start", "average_start", int, "step from which weights are averaged"),
    ("--average-every", "average_every", int, "steps between weights that are averaged"),
    ("--activation-penalty", "activation_penalty", float, "AR: times the mean square of the features"),
    ("--change-penalty", "change_penalty", float, "TAR: times the mean square of their change from step to step"),
    ("--eval-every", "eval_every", int, "steps between evaluations"),
    ("--eval-tokens", "eval_tokens", int, "validation tokens of an evaluation during training"),
    ("--checkpoint-every", "checkpoint_every", int, "steps between checkpoints"),
    ("--log-every", "log_every", int, "steps between lines of metrics.jsonl"),
    ("--seed", "seed", int, "of weights, dropout and data order"),
    ("--device", "device", str, "auto, cpu, cuda or cuda:N"),
    (
        "--precision",
        "precision",
        ("auto", "float32", "bfloat16"),
        "auto: bfloat16 on a GPU, its weights kept in float32",
    ),
    ("--threads", "threads", int, "CPU threads; 0: as PyTorch chooses"),
    ("--compile", "compile", bool, "torch.compile the layers"),
    ("--cuda-graph", "cuda_graph", bool, "capture the step in CUDA graphs on a GPU (default)"),
)

# Options of fixed-point training: flag, field of FixpointConfig, type, help.
FIXPOINT_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("--steps", "steps", int, "optimizer steps (default: 300)"),
    ("--batch-size", "batch_size", int, "different phrases of a step (default: 256)"),
    ("--phrase", "phrase", int, "tokens of a phrase (default: 1, every token of the vocabulary as often as any other)"),
    (
        "--repeats",
        "repeats",
        int,
        "passes over a phrase, in the second half of which its context is to rest (default: 16)",
    ),
    ("--diversity", "diversity", float, "weight of the term that keeps fixed points apart (default: 0.3)"),
    ("--tolerance", "tolerance", float, "relative change of a context that counts as rest, in reports (default: 1e-3)"),
    ("--lr", "lr", float, "peak learning rate (default: 2e-3)"),
    ("--seed", "seed", int, "of weights and of the order of phrases (default: 0)"),
)

# What may change when a run is resumed; all else is the run's own.
RESUME_OPTIONS = {
    "--steps": "steps",
    "--device": "device",
    "--threads": "threads",
    "--checkpoint-every": "checkpoint_every",
}


class Parser(argparse.ArgumentParser):
    """Errors are one line, `newllm: error: ...`, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        command = self.prog if self.prog != "newllm" else "newllm"
        self.exit(2, f"newllm: error: {' '.join(message.split())} (see {command} --help)\n")


def _command(module: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        return import_module(module).run(args)

    return run


def build_parser() -> Parser:
    parser = Parser(prog="newllm", description="Train, measure and talk with New-LLM.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"newllm {newllm.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="name")

    def add(name: str, summary: str, description: str) -> Parser:
        sub = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        sub.set_defaults(command=_command(f"newllm.cli.{name}"))
        return sub

    _train_options(add("train", "train a model on a text", TRAIN_TEXT))
    _fixpoint_options(add("fixpoint", "train contexts to come to rest, as a start for train --init", FIXPOINT_TEXT))
    _prepare_options(add("prepare", "tokenise a text once for many runs", PREPARE_TEXT))
    _eval_options(add("eval", "perplexity of a trained model", EVAL_TEXT))
    _calibrate_options(add("calibrate", "give a trained run recall, without training it", CALIBRATE_TEXT))
    _generate_options(add("generate", "write text with a trained model", GENERATE_TEXT))
    _judge_options(add("judge", "measure what models write, beside human text", JUDGE_TEXT))
    _diagnose_options(add("diagnose", "what the contexts of a trained model do", DIAGNOSE_TEXT))
    _compare_options(add("compare", "New-LLM against a Transformer of its size", COMPARE_TEXT))
    return parser


TRAIN_TEXT = (
    "Train a model. With no options: preset tiny on the Python Language Reference that ships inside Python, a few minutes "
    "on two CPU cores. Ctrl-C saves and stops; --resume goes on, as it does after a crash."
)
PREPARE_TEXT = (
    "Read a text, train its tokenizer and tokenise it, into a folder that --data of the other commands takes: for many runs, "
    "or to train on another machine."
)
EVAL_TEXT = (
    "Perplexity of a run's best checkpoint, beside that of word counts alone (the unigram model of its training text)."
)
CALIBRATE_TEXT = (
    "Give a trained model tables of recall: what followed the last 1, 2 and 3 tokens, and which words are recent. Their shares of a "
    "prediction are set so that the run's validation text is likeliest; nothing else is trained. Writes the model as a new run. Of a run "
    "that was trained with recall the shares are set anew."
)
DIAGNOSE_TEXT = (
    "Of every cell with coupling full, along a text: largest Lyapunov exponent, how long another start is remembered, passes that "
    "chunks of time take, effective rank of the contexts, gate statistics. On the CPU, in float64. Prints tables and writes diagnose.png into the run."
)
FIXPOINT_TEXT = (
    "Train cells that see their own context to come to rest under a token or phrase that is repeated, each at a place of its own, "
    "and report convergence, effective rank and similarity of the fixed points before and after. Writes a run folder that newllm "
    "train --init starts from. With no options: preset classic on the vocabulary of the built-in text. Ctrl-C saves and stops; "
    "--resume goes on."
)
GENERATE_TEXT = "Write on from a prompt with a run's best checkpoint, at constant memory however long the text."
JUDGE_TEXT = (
    "Let runs write on from the same held-out prompts at fixed seeds, and print their texts side by side and one table: variety, "
    "repetition, how long names keep being mentioned, faults of grammar, and perplexity of every text to every model, beside the "
    "same figures of the text that people wrote there. All samples go into judge.md and judge.json."
)
COMPARE_TEXT = (
    "Train New-LLM and a Transformer with the same number of parameters on the same data for the same steps, and print one "
    "table: perplexity, tokens/s, peak memory, state at generation."
)


def _train_options(parser: Parser) -> None:
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with a run (name, path or 'latest') from its last checkpoint; "
        f"beside it only {', '.join(RESUME_OPTIONS)}, --stop-after and --max-minutes may be given",
    )  # fmt: skip
    parser.add_argument("--init", metavar="RUN", help="start from the weights of another run, with its tokenizer, and its model "
                        "where no preset or recipe is given")  # fmt: skip
    parser.add_argument("--teacher", nargs="+", metavar="RUN", help="learn what these trained runs expect, not the text alone "
                        "(distillation); they read it once, before the first step")  # fmt: skip
    parser.add_argument("--stop-after", type=int, metavar="N", help="save and stop after N steps of this session")
    parser.add_argument("--max-minutes", type=float, metavar="X", help="save and stop after X minutes of this session")
    _new_run_options(parser)


def _fixpoint_options(parser: Parser) -> None:
    parser.add_argument("--resume", metavar="RUN", help="go on with a run of newllm fixpoint (name or path) from its last "
                        "checkpoint; beside it only --steps, --device, --threads, --json and --stop-after may be given")  # fmt: skip
    parser.add_argument("--stop-after", type=int, metavar="N", help="save and stop after N steps of this session")
    _data_options(parser.add_argument_group("data"))
    run = parser.add_argument_group("run folder")
    _option(run, "--run", "run", str, "its name under ./runs or $NEWLLM_RUNS (default: fixpoint, preset and time)")
    _option(run, "--out", "out", str, "its path, instead of a name")
    model = parser.add_argument_group("model", "each overrides the preset")
    _option(model, "--preset", "preset", str, "classic (default), tiny, 40m, 100m or 1b")
    for flag, field, kind, text in MODEL_OPTIONS:
        _option(model, flag, field, kind, text)
    training = parser.add_argument_group("training")
    for flag, field, kind, text in FIXPOINT_OPTIONS:
        _option(training, flag, field, kind, text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _run_options(parser)


def _compare_options(parser: Parser) -> None:
    parser.add_argument("--resume", metavar="PATH", help="go on with a comparison that was interrupted (a folder)")
    parser.add_argument("--minutes", type=float, metavar="X", help="train each for X minutes instead of for the same steps; its own "
                        "first steps tell how many that are")  # fmt: skip
    parser.add_argument(
        "--transformer-recall", action="store_true", help="give the Transformer the same tables of recall, too"
    )
    _new_run_options(parser)


def _prepare_options(parser: Parser) -> None:
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="keep the first documents (word: lines) of the training text, "
                        "at most N tokens")  # fmt: skip
    parser.add_argument(
        "--compress", action="store_true", help="pack the tokens with xz: half the bytes, slower to read"
    )
    _data_options(parser.add_argument_group("data"))


def _option(group: argparse._ArgumentGroup, flag: str, field: str, kind: Any, text: str) -> None:
    """Absent options leave no trace in the namespace: the preset decides."""
    if kind is bool:
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    else:
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": _METAVARS[kind]}
    group.add_argument(flag, dest=field, default=argparse.SUPPRESS, help=text, **how)


def _data_options(data: argparse._ArgumentGroup) -> None:
    _option(data, "--data", "data", str, "builtin (default), a file or folder of .txt, .jsonl, .json, .parquet (also .gz, .xz), "
            "what newllm prepare wrote, or hub:NAME[:CONFIGURATION]; a folder with train.* and valid.* keeps its split")  # fmt: skip
    _option(data, "--text-field", "text_field", str, "field or column that holds the text (default: text)")
    _option(data, "--tokenizer", "tokenizer", str, "bpe (default), word, or a tokenizer.json or run to take it from")
    _option(
        data, "--vocab-size", "vocab_size", int, "most tokens of the vocabulary (default: bpe the preset's, word all)"
    )


def _new_run_options(parser: Parser) -> None:
    """Of every command that makes a run."""
    data = parser.add_argument_group("data")
    run = parser.add_argument_group("run folder")
    model = parser.add_argument_group("model", "each overrides the preset")
    training = parser.add_argument_group("training", "each overrides what the preset trains with")

    parser.add_argument("--config", metavar="FILE", help="take options from a recipe: a TOML file, or a name such as "
                        "wikitext-2; options given here come first")  # fmt: skip
    _data_options(data)
    _option(run, "--run", "run", str, "its name under ./runs or $NEWLLM_RUNS (default: preset and time)")
    _option(run, "--out", "out", str, "its path, instead of a name")
    _option(model, "--preset", "preset", str, "tiny (default), classic, 40m, 100m or 1b")
    for flag, field, kind, text in MODEL_OPTIONS:
        _option(model, flag, field, kind, text)
    for flag, field, kind, text in TRAINING_OPTIONS:
        _option(training, flag, field, kind, text)


_METAVARS = {int: "N", float: "X", str: "NAME"}


def _run_options(parser: Parser) -> None:
    """Of every command that uses a trained run."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    _thread_option(parser)


def _thread_option(parser: Parser) -> None:
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: as PyTorch chooses)")


def _diagnose_options(parser: Parser) -> None:
    parser.add_argument("run", nargs="?", default="latest", help="name or path of a run (default: latest)")
    parser.add_argument("--data", help="another text than the run's validation text: as in newllm train")
    parser.add_argument("--text-field", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="of the text (default: 1024)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _thread_option(parser)


def _calibrate_options(parser: Parser) -> None:
    parser.add_argument(
        "of", nargs="?", default="latest", metavar="RUN", help="name or path of a run (default: latest)"
    )
    parser.add_argument(
        "--recall", type=int, metavar="N", help="entries of each table (default: as the run was trained, else 16384)"
    )
    parser.add_argument(
        "--run", metavar="NAME", help="name of the new run under ./runs or $NEWLLM_RUNS (default: RUN-recall)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="its path, instead of a name")
    _run_options(parser)


def _eval_options(parser: Parser) -> None:
    parser.add_argument("run", nargs="?", default="latest", help="name or path of a run (default: latest)")
    parser.add_argument("--data", help="another text than the run's own: as in newllm train")
    parser.add_argument("--text-field", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument(
        "--split", choices=("train", "valid", "test", "all"),
        help="what to score (default: valid and test; of --data without such a split, all of it)",
    )  # fmt: skip
    parser.add_argument("--by-position", action="store_true", help="and how it depends on the place in a document")
    dynamic = parser.add_argument_group(
        "dynamic evaluation", "weights go on learning from the text that has been scored; reported beside the static figures"
    )  # fmt: skip
    dynamic.add_argument("--dynamic", action="store_true", help="measure this too")
    dynamic.add_argument("--dynamic-lr", type=float, metavar="X", help="learning rate (default: 5e-5)")
    dynamic.add_argument("--dynamic-decay", type=float, metavar="X",
                         help="rate of return to the trained weights (default: 3e-3)")  # fmt: skip
    dynamic.add_argument("--dynamic-segment", type=int, metavar="N", help="tokens per update (default: 32)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    _run_options(parser)


def _generate_options(parser: Parser) -> None:
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="text to go on from (default: the start of a text)"
    )
    parser.add_argument("--run", default="latest", help="name or path of a run (default: latest)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="tokens to write (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is the likeliest (default: 0.8)")
    parser.add_argument("--recall-share", type=float, default=0.5, metavar="X",
                        help="how much of its share recall has in what is written, 0 to 1 (default: 0.5)")  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from the fewest tokens that make up X only")
    parser.add_argument("--seed", type=int, metavar="N", help="the same text every time (default: another each time)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts per prompt (default: 1)")
    parser.add_argument(
        "--stop-at-eos", action="store_true", help="stop where the model ends its text (word: its line)"
    )
    parser.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, default=True,
        help="on a GPU, capture the step in a CUDA graph (default)",
    )  # fmt: skip
    _run_options(parser)


def _judge_options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs with one tokenizer, or the folder of a comparison "
                        "(default: latest)")  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), help="text of the prompts (default: test, else valid)"
    )
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="texts of each run (default: 16)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="of a prompt (default: 32)")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="of a text (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is the likeliest (default: 0.8)")
    parser.add_argument("--recall-share", type=float, default=0.5, metavar="X",
                        help="how much of its share recall has in what is written, 0 to 1 (default: 0.5)")  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from the fewest tokens that make up X only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first text (default: 0)")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="samples to print (default: 3)")
    parser.add_argument(
        "--grammar", action=argparse.BooleanOptionalAction,
        help='count faults of grammar (default: where the extra "judge" is installed)',
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="where judge.md and judge.json go (default: the first run)")
    _run_options(parser)


if __name__ == "__main__":
    build_parser().print_help(sys.stdout)
