"""`secura generate`: a prompt through the base, the adapter, or both side by side."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from secura._extras import require
from secura.cli import adapters
from secura.cli.errors import UserError, one_line
from secura.cli.models import DTYPES, add_loading_flags, load_model, load_tokenizer
from secura.cli.parser import Parser
from secura.wording import plain


def make_parser() -> Parser:
    """The flags of `secura generate`."""
    parser = Parser(prog="secura generate", description=__doc__)
    parser.add_argument(
        "--prompt",
        required=True,
        action="append",
        help="the question; may be given several times; - reads it from standard input",
    )
    parser.add_argument(
        "--adapter_name_or_path",
        "--adapter",
        metavar="DIR",
        help="the adapter; the base alone if not",
    )
    parser.add_argument(
        "--model_name_or_path",
        "--model",
        metavar="MODEL",
        help="the base (or a merged checkpoint); an adapter names the one it was trained on",
    )
    parser.add_argument(
        "--compare", action="store_true", help="base and adapter side by side, in a table"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token each time"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="with a temperature above 0")
    parser.add_argument("--seed", type=int, default=0, help="with a temperature above 0")
    parser.add_argument(
        "--raw", action="store_true", help="leave out the tokenizer's chat template"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="auto on an accelerator, else float32")
    parser.add_argument("--device", help="such as cpu or cuda:0; an accelerator where there is one")
    add_loading_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Answer each prompt on standard output."""
    args = make_parser().parse_args(argv)
    check(args)
    prompts = [read_stdin() if prompt == "-" else prompt for prompt in args.prompt]
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty: give a question")
    model, tokenizer = load(args)
    if args.compare:
        compare(model, tokenizer, prompts, args)
        return 0
    model = settle(model)
    for number, prompt in enumerate(prompts):
        if number:
            print()
        answer(model, tokenizer, prompt, args, stream=True)
    return 0


def read_stdin() -> str:
    """What standard input holds, without the line break that ends a file."""
    if sys.stdin is None:
        raise UserError("--prompt - reads standard input, which is closed")
    return sys.stdin.read().removesuffix("\n")


def check(args: Any) -> None:
    """Raise `UserError` for flags that do not go together or values out of range."""
    if not args.model_name_or_path and not args.adapter_name_or_path:
        raise UserError("give --model_name_or_path, --adapter_name_or_path, or both")
    if args.compare and not args.adapter_name_or_path:
        raise UserError("--compare needs --adapter_name_or_path")
    if args.max_new_tokens < 1:
        raise UserError("--max_new_tokens must be 1 or more")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature must be 0 or more, and --top_p above 0 and at most 1")


def load(args: Any) -> tuple[Any, Any]:
    """The model, with its adapter if one is named, on its device; and the tokenizer."""
    import torch

    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.empty(0, device=args.device or best or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {args.device}: torch cannot use it here ({one_line(error)}); leave --device "
            f"out to take {best or 'the CPU'}"
        ) from error
    dtype = args.dtype or ("float32" if device.type == "cpu" else "auto")
    adapter, base = args.adapter_name_or_path, args.model_name_or_path
    if not adapter:
        loading = {
            "revision": args.model_revision or "main",
            "trust_remote_code": args.trust_remote_code,
        }
        model = load_model(base, dtype=dtype, **loading).eval()
        return model.to(device), load_tokenizer(base, **loading)
    config = adapters.load_adapter_config(adapter, check_base=not args.no_check_base)
    task = plain(config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"adapter {adapter!r} was trained for {task}: there is no text to generate; 'secura "
            "merge' makes a plain checkpoint of it"
        )
    model, tokenizer = adapters.load(args, config, dtype)
    base = model.get_base_model()
    if not base.can_generate() or base.main_input_name != "input_ids":
        raise UserError(
            f"adapter {adapter!r} is of a {type(base).__name__}, which writes no text from a text: "
            "'secura merge' makes a plain checkpoint of it"
        )
    return model.to(device), tokenizer


def settle(model: Any) -> Any:
    """The model that answers soonest from now on: merged, where it would form W' for each token.

    What cannot be merged (a quantised base, a weight shared by two modules) is left as it was.
    """
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "replaces_product", False):
        return model
    with suppress(ValueError):
        return model.merge_and_unload()
    return model


def answer(model: Any, tokenizer: Any, prompt: str, args: Any, *, stream: bool = False) -> str:
    """One answer, without the prompt and the special tokens; printed as it grows with `stream`."""
    transformers = require("transformers", "train")
    import torch

    if tokenizer.chat_template and not args.raw:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise UserError("the tokenizer makes no token of --prompt")
    sampling: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        torch.manual_seed(args.seed)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=args.max_new_tokens,
                pad_token_id=pad,
                streamer=streamer if stream else None,
                **sampling,
            )
    except IndexError as error:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", "no more")
        raise UserError(
            f"the model has {positions} positions: shorten --prompt or lower --max_new_tokens"
        ) from error
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def compare(model: Any, tokenizer: Any, prompts: list[str], args: Any) -> None:
    """Print a table: a row a prompt, the base's answer beside the adapter's."""
    table = require("rich.table", "train").Table(show_lines=True, expand=True)
    for title in ("prompt", "base", "adapter"):
        table.add_column(title, ratio=1 if title == "prompt" else 2, overflow="fold")
    text = require("rich.text", "train").Text
    with model.disable_adapter():
        plain = [answer(model, tokenizer, prompt, args) for prompt in prompts]
    model = settle(model)
    adapted = [answer(model, tokenizer, prompt, args) for prompt in prompts]
    for cells in zip(prompts, plain, adapted, strict=True):
        table.add_row(*map(text, cells))
    require("rich.console", "train").Console().print(table)


__all__ = ["answer", "main", "make_parser", "read_stdin", "settle"]
