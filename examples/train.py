"""Trains a small convolutional network twice, with torch.optim.SGD and with FusedSGD, and compares the two.

    python examples/train.py                                     # scikit-learn's digits on the CPU, under a minute
    python examples/train.py --data path/to/images --color rgb   # a folder of images, one sub-folder a class
    python examples/train.py --device cuda --amp                 # mixed precision with a GradScaler
    python examples/train.py --accumulate 4 --clip 1 --ema 0.99  # what large batches need, inside the step
    python examples/train.py --optimizer lars --batch-size 512   # LARS; docs/large-batch.md compares batch sizes
    python examples/train.py --precision bfloat16-split          # bfloat16 weights, nothing lost: docs/precision.md

Both runs start from the same seed and see the same batches, so in float32 on a CPU their weights must end equal to the
bit; the exit code is 1 if they do not. Needs, beside fused_sgd: scikit-learn, pillow, matplotlib, rich.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from image_data import CHANNELS, Data, InputError, load_data
from narrow import MOMENTUM_DTYPES, PRECISIONS
from report import describe_machine, draw, print_report
from sequences import FusedSequence, TorchSequence
from timing import Timing, take_turns
from training import compute_loss, make_loader, train

SGD_LR = 0.1
LARS_LR = 8.0  # good at batch 32 and 256 in docs/large-batch.md
COLUMNS = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def equal_to_the_bit(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights and running statistics have the same bytes; ``==`` would miss the sign of a zero."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(mine.cpu().numpy().tobytes() == other.cpu().numpy().tobytes() for mine, other in pairs)


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between two models' weights, as a part of the largest weight; NaN if one is."""
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        difference = torch.stack([(mine - other).abs().max() for mine, other in pairs]).max()
        return (difference / torch.stack([other.abs().max() for _, other in pairs]).max()).item()


def not_compared(args: argparse.Namespace) -> str:
    """Why weights are not to be compared with torch's, or an empty string."""
    if args.optimizer == "lars":
        return "LARS is another rule"
    if args.precision != "float32":
        return "FusedSGD trains bfloat16 weights and torch.optim.SGD float32 ones"
    if args.momentum_dtype not in (None, "float32"):
        return f"FusedSGD's momentum is {args.momentum_dtype} and torch.optim.SGD's float32"
    return ""


def verdict(equal: bool | None, first: nn.Module, second: nn.Module, args: argparse.Namespace) -> str:
    """What to say of the weights of two runs."""
    if equal is None:
        return f"not compared, {not_compared(args)}"
    if equal:
        return "yes"
    return f"no, the largest difference is {largest_difference(first, second):.1e} of the largest weight"


def time_optimizers(torchs: nn.Module, our: nn.Module, data: Data, args: argparse.Namespace) -> list[Timing]:
    """Times four optimizers on copies of the trained models with the gradients of one batch; ours comes first.

    Clipping and averaging are part of the step. Unscaling and dividing are not: torch's would shrink the gradients from
    step to step.
    """
    images, labels = next(iter(make_loader(data, args)))
    for model in (torchs, our):
        model.train()
        compute_loss(model, images, labels, args).backward()
    args = argparse.Namespace(**{**vars(args), "amp": False, "accumulate": 1})
    ours = FusedSequence(copy_with_gradients(our), args)
    kinds = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}, "torch for-loop": {"foreach": False}}
    peers = {name: TorchSequence(copy_with_gradients(torchs), args, **options) for name, options in kinds.items()}
    return take_turns({ours.name: ours, **peers}, args.device)


def copy_with_gradients(model: nn.Module) -> nn.Module:
    """A copy of a model and of its parameters' gradients."""
    copied = copy.deepcopy(model)
    for param, source in zip(copied.parameters(), model.parameters(), strict=True):
        param.grad = None if source.grad is None else source.grad.clone()
    return copied


def number(
    kind: type[int] | type[float], minimum: float, below: float = math.inf, above: bool = False
) -> Callable[[str], float]:
    """A type for argparse: a finite number that is not below a minimum (or is above it), and is below ``below``."""
    bounds = f"{'above' if above else 'of at least'} {minimum}" + (f" and below {below}" if below < math.inf else "")
    largest = torch.iinfo(torch.int64).max if kind is int else torch.finfo(torch.float32).max

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < below or value > largest or (above and value == minimum):
            limit = f" and at most {largest:.4g}" if value > largest else ""
            raise argparse.ArgumentTypeError(f"{text} is not a finite {kind.__name__} {bounds}{limit}")
        return value

    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that are None: their help says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Train a small convolutional network with torch.optim.SGD and with FusedSGD, and compare. Their"
        " weights must be equal to the bit, in float32 on a CPU without --clip; else the exit code is 1.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="'digits', or a folder: PATH/train and PATH/val (or test), or PATH/class")
    add("--image-size", type=number(int, 8), default=32, help="images of a folder are resized to this square")
    add("--color", choices=CHANNELS, default="rgb", help="how images of a folder are read")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    optimizer_help = (
        "lars: FusedLARS instead of FusedSGD. The peer remains torch.optim.SGD, at --sgd-lr: both learn from the same"
        " batches, accuracy, loss and time are compared, and weights are not, since LARS is another rule"
    )
    add("--optimizer", choices=("sgd", "lars"), default="sgd", help=optimizer_help)
    precision_help = (
        "other than float32: FusedSGD trains bfloat16 weights, with bfloat16 gradients, and keeps or rounds off what"
        " they have no bits for as the name says (arithmetic: float32 on a CPU, bfloat16 on a GPU). The peer remains"
        " torch.optim.SGD in float32: accuracy, loss and time are compared, and weights are not"
    )
    add("--precision", choices=PRECISIONS, default="float32", help=precision_help)
    momentum_dtype_help = (
        "what FusedSGD keeps momentum in (default: float32; the weights' dtype with --precision bfloat16 and"
        " bfloat16-stochastic). int8 where rows are whole blocks of 64: --width 64 has more of them"
    )
    add("--momentum-dtype", choices=MOMENTUM_DTYPES, help=momentum_dtype_help)
    add("--batch-size", type=number(int, 1), default=128, help="images a step, also with --accumulate")
    add("--epochs", type=number(int, 1), default=20, help="passes over the training set")
    lr_help = f"learning rate after the warm-up (default: {SGD_LR}; with --optimizer lars: {LARS_LR})"
    add("--lr", type=number(float, 0), help=lr_help)
    sgd_lr_help = f"with --optimizer lars: of torch.optim.SGD, and of biases and norms under LARS (default: {SGD_LR})"
    add("--sgd-lr", type=number(float, 0), help=sgd_lr_help)
    warmup_help = "epochs, also in part, over which the learning rate grows (default: a tenth of all steps)"
    add("--warmup-epochs", type=number(float, 0), metavar="E", help=warmup_help)
    add("--momentum", type=number(float, 0), default=0.9, help="momentum factor, of Nesterov's kind")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="L2 penalty")
    add("--amp", action="store_true", help="autocast and a GradScaler")
    accumulate_help = "computes the gradients of each batch in K equal parts (batch norm sees the parts)"
    add("--accumulate", type=number(int, 1), default=1, metavar="K", help=accumulate_help)
    clip_help = "clips the gradients by their global L2 norm; the bits of the two norms differ, so weights may"
    add("--clip", type=number(float, 0, above=True), metavar="NORM", help=clip_help)
    ema_help = "tests an exponential moving average of the weights, too"
    add("--ema", type=number(float, 0, below=1), metavar="DECAY", help=ema_help)
    add(
        "--width",
        type=number(int, 1),
        default=32,
        help="channels of the model's first stage; the last has four times as many",
    )
    add("--seed", type=number(int, 0), default=0, help="of the weights, the batches and the split of a folder")
    add("--threads", type=number(int, 1), default=torch.get_num_threads(), help="CPU threads; 1 on a busy machine")
    add("--output", type=Path, default=Path("runs/demo.png"), help="where the picture goes")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Finds out before the training, not after, what cannot work; fills in learning rates; sets up torch."""
    if args.optimizer == "lars" and args.weight_decay == 0:
        raise InputError("--optimizer lars adapts parameters that have weight decay: --weight-decay must be above 0")
    if args.optimizer == "sgd" and args.sgd_lr is not None:
        raise InputError("--sgd-lr is for --optimizer lars; both runs of --optimizer sgd train at --lr")
    if args.momentum_dtype is not None and args.momentum == 0:
        raise InputError("--momentum-dtype is of a momentum that --momentum 0 does not have")
    if args.precision != "float32" and args.amp:
        raise InputError("--amp is for float32 weights; a --precision of bfloat16 weights needs no GradScaler")
    if args.lr is None:
        args.lr = LARS_LR if args.optimizer == "lars" else SGD_LR
    if args.sgd_lr is None:
        args.sgd_lr = SGD_LR if args.optimizer == "lars" else args.lr
    if args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} finds no usable GPU here; use --device cpu")
    if args.output.suffix != ".png":
        raise InputError(f"--output: {args.output} does not end in .png")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: no folder for {args.output}: {error}") from error
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True  # else two runs differ whatever the optimizer


def compare(args: argparse.Namespace) -> int:
    """Trains twice, times, reports; returns the exit code."""
    prepare(args)
    data = load_data(args)
    size = min(args.batch_size, len(data.train))  # type: ignore[arg-type]
    if size % args.accumulate:
        raise InputError(f"--accumulate: a batch of {size} images has no {args.accumulate} equal parts")
    console = Console()
    machine = describe_machine(args.device)
    print(machine)
    with Progress(*COLUMNS, console=console) as bar:
        runs = [train(make_sequence, data, args, bar) for make_sequence in (TorchSequence, FusedSequence)]
    models = runs[0].model, runs[1].model
    equal = None if not_compared(args) else equal_to_the_bit(*models)
    timings = time_optimizers(*models, data, args)
    print_report(console, runs, timings, verdict(equal, *models, args))
    weights = "" if equal is None else f": weights {'' if equal else 'NOT '}equal to the bit"
    draw(args.output, f"A small convolutional network on {data.name}{weights}", machine, runs, timings)
    print(f"picture: {args.output}")
    # Under autocast or on a GPU the gradients themselves need not repeat, and for clipping torch sums a norm in float32
    # and FusedSGD in float64: there a difference proves nothing.
    excused = args.amp or args.device == "cuda" or args.clip is not None
    return 1 if equal is False and not excused else 0


def main() -> int:
    """Runs the command line."""
    parser = build_parser()
    try:
        return compare(parser.parse_args())
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
