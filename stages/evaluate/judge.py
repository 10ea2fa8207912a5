"""Two files of answers, judged in pairs by a model behind an OpenAI-compatible endpoint."""

import dataclasses
import importlib.metadata
import json
import math
import os
import random
import shlex
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed

import httpx2
from tqdm import tqdm

from sharding.errors import UserError
from stages.evaluate.answers import Answer, align, generator_of, read_answers
from stages.files.output import Manifest, Output
from stages.files.paths import file_sha256, text_sha256
from stages.files.run import Stopped, stop_signal

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
PROMPT = "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
INSTALL = "pip install alpaca_eval==0.6.6 'setuptools<81'"  # it imports pkg_resources
FIRST_PAUSE = 1.0  # seconds before a request is tried again; each further pause is twice as long
RETRIED = (408, 409, 429, 500, 502, 503, 504)  # what goes away by itself, by HTTP status


@dataclasses.dataclass
class Judge:
    """AlpacaEval 2.0's judgement: its own prompt, and the judge's log-probs as the preference.

    The prompt is read from the installed package alpaca_eval. Which answer the judge sees first is
    drawn from the instruction, as there. A preference is 2 − P(m) / (P(m) + P(M)), with 2 for the
    model's answer; equal answers are 1.5 unasked. The key is read from OPENAI_API_KEY, if it is
    set. Every reply is kept in OUT.partial, so that a run that is stopped asks nothing twice.
    """

    outputs: str
    """The model's answers: a model_outputs.json or samples.jsonl."""
    reference: str
    """The reference's answers; on the leaderboard gpt4_1106_preview's."""
    out: str
    """The annotations.json to write, in AlpacaEval's form."""
    model: str = "gpt-4-1106-preview"
    """The judge."""
    endpoint: str = "https://api.openai.com/v1"
    """Where /chat/completions is."""
    response: int = 0
    """Which response of a samples.jsonl's rows is taken, counted from 0."""
    common_only: bool = False
    """Judge the instructions that both answer, where others are answered in one file alone."""
    price_per_million: float = 10.0
    """Dollars for a million tokens of prompt and reply, as AlpacaEval counts."""
    parallel: int = 4
    """Requests at a time."""
    retries: int = 8
    """So often a request is tried again, after 1, 2, 4, … seconds, at most a minute."""
    timeout: float = 60.0
    """Seconds that a reply may take."""
    overwrite: bool = False
    """Replace an --out that is there."""


def main(args: Judge) -> None:
    if args.parallel < 1 or args.retries < 0:
        raise UserError("--parallel must be at least 1, and --retries at least 0")
    template = prompt_template()
    files = (args.outputs, args.reference)
    ours, theirs = (read_answers(path, args.response) for path in files)
    counts: Counter = Counter()
    pairs = align(ours, theirs, files, args.common_only, counts)
    names = generator_of(ours, files[0]), generator_of(theirs, files[1])
    manifest = Manifest(
        stage="evaluate judge",
        arguments={"model": args.model, "response": args.response},
        inputs={path: file_sha256(path) for path in files},
        identities={
            "prompt": text_sha256(template),
            "outputs": file_sha256(args.outputs),
        },
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return
    ask_all(args, template, pairs, output)
    kept = {row["prompt_id"]: row for row, _ in output.rows()}
    rows = [_annotation(args, *pair, *names, kept.get(pair[0].key)) for pair in pairs]
    unclear = sum(row["preference"] is None for row in rows)
    if unclear:
        counts["without a preference (the reply began with neither m nor M)"] = unclear
    tokens = sum(row["tokens"] for row in kept.values())
    price = sum(row["price_per_example"] for row in rows)
    known = [row["preference"] - 1 for row in rows if row["preference"] is not None]
    results = {
        "requests": len(kept),
        "tokens": tokens,
        "price": price,
        "win_rate": 100 * sum(known) / len(known) if known else None,
    }
    output.finish_as(rows, counts, results)
    print(
        f"{len(kept)} judgements, {tokens} tokens, ${price:.2f}; now: python -m stages.evaluate "
        f"score --annotations {shlex.quote(args.out)} --out …"
    )


def official_command(outputs: str, reference: str | None = None) -> str:
    """What to run for AlpacaEval's own judgement of a file of ours."""
    command = f"alpaca_eval --model_outputs {shlex.quote(outputs)}"
    command += f" --reference_outputs {shlex.quote(reference)}" if reference else ""
    return f"{command} --annotators_config {ANNOTATOR}    # {INSTALL}"


# ------------------------------------------------------------------------------- the prompt


def prompt_template() -> str:
    """AlpacaEval 2.0's prompt, of the installed package; importing it is not needed."""
    try:
        package = importlib.metadata.distribution("alpaca_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the judge's prompt is alpaca_eval's, which is not installed: {INSTALL}"
        ) from None
    file = package.locate_file(f"alpaca_eval/{PROMPT}")
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"alpaca_eval {package.version} holds no {PROMPT}: {INSTALL}") from None


def chat(template: str, instruction: str, first: str, second: str) -> list[dict]:
    """The messages of one judgement, as alpaca_eval makes them: each placeholder is replaced once,
    in turn, and the ChatML text is then cut into messages."""
    text = template
    for name, value in (("instruction", instruction), ("output_1", first), ("output_2", second)):
        text = text.replace(f"{{{name}}}", value, 1)
    messages = []
    for part in text.strip().split("<|im_start|>")[1:]:
        role, _, content = part.partition("\n")
        messages.append({"role": role.strip(), "content": content.split("<|im_end|>")[0].strip()})
    return messages


def is_switched(instruction: str) -> bool:
    """Whether the model's answer stands first: alpaca_eval's coin at its seed 0."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]


def preference(reply: dict) -> float | None:
    """2 − P(m) / (P(m) + P(M)) of the reply's first token, so 2 where the second answer is better;
    None where neither is among the likeliest tokens (completion_parsers.logprob_parser)."""
    top = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    weights = {t["token"]: math.exp(t["logprob"]) for t in top if t["token"] in ("m", "M")}
    total = sum(weights.values())
    return 2 - weights.get("m", 0.0) / total if total > 0 else None


# ------------------------------------------------------------------------------ the endpoint


def ask_all(args: Judge, template: str, pairs: list[tuple[Answer, Answer]], output: Output) -> None:
    """A row {prompt_id, reply, preference, tokens, seconds} for each pair that is not there yet."""
    todo = [(a, b) for a, b in pairs if a.text != b.text and not output.has(a.key)]
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    stopping = threading.Event()
    spent = sum(row["tokens"] for row, _ in output.rows())
    bar = tqdm(total=len(pairs), initial=len(pairs) - len(todo), unit=" pairs", desc="judge")
    with (
        bar,
        stop_signal() as check_stop,
        httpx2.Client(headers=headers, timeout=args.timeout) as client,
        ThreadPoolExecutor(args.parallel) as pool,
    ):
        futures = {
            pool.submit(ask, args, client, template, *pair, stopping): pair[0].key for pair in todo
        }
        end = None
        for future in as_completed(futures):
            try:
                row = future.result()
                output.write({"prompt_id": futures[future]} | row)
                spent += row["tokens"]
                bar.set_postfix_str(f"${spent * args.price_per_million / 1e6:.2f}", refresh=False)
                bar.update()
                check_stop()
            except CancelledError:
                continue
            except (UserError, Stopped) as error:  # what is asked already is still kept
                end = end or error
                stopping.set()
                for other in futures:
                    other.cancel()
        if end is not None:
            raise end


def ask(args: Judge, client, template: str, ours: Answer, theirs: Answer, stopping) -> dict:
    switched = is_switched(ours.key)
    first, second = (ours.text, theirs.text) if switched else (theirs.text, ours.text)
    body = {
        "model": args.model,
        "messages": chat(template, ours.key, first, second),
        "max_tokens": 1,
        "temperature": 1,
        "top_p": 1.0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    start = time.monotonic()
    reply = _post(args, client, body, stopping)
    try:
        found = preference(reply)
        tokens = reply.get("usage", {}).get("total_tokens", 0)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError(
            f"{args.endpoint}: the reply has no choices[0].logprobs.content[0].top_logprobs "
            f"({json.dumps(reply)[:200]}): the judge must be a server that gives log-probs"
        ) from None
    return {
        "reply": reply["choices"][0],
        "preference": None if found is None else 3 - found if switched else found,
        "tokens": tokens,
        "seconds": time.monotonic() - start,
    }


def _post(args: Judge, client, body: dict, stopping: threading.Event) -> dict:
    """The reply, after some retries where that may help."""
    url = f"{args.endpoint.rstrip('/')}/chat/completions"
    for attempt in range(args.retries + 1):
        try:
            response = client.post(url, json=body)
            if response.status_code == 200:
                return response.json()
            text = " ".join(response.text.split())[:200]
            problem = f"HTTP {response.status_code}: {text}"
            if response.status_code not in RETRIED:
                break
        except (httpx2.HTTPError, ValueError) as error:  # no network, no time, no JSON
            problem = repr(error)
        if attempt < args.retries and stopping.wait(min(FIRST_PAUSE * 2**attempt, 60)):
            break
    raise UserError(
        f"{url}: {problem}: what was judged is kept, and the same command goes on once the "
        "endpoint, --model and OPENAI_API_KEY are right"
    )


def _annotation(
    args: Judge, ours: Answer, theirs: Answer, our_name: str, their_name: str, row: dict | None
) -> dict:
    """As alpaca_eval writes them; row None: the answers are equal, and nobody was asked."""
    return {
        "instruction": ours.key,
        "output_1": theirs.text,
        "generator_1": their_name,
        "dataset": theirs.dataset or ours.dataset,
        "output_2": ours.text,
        "generator_2": our_name,
        "annotator": ANNOTATOR if args.model == "gpt-4-1106-preview" else args.model,
        "preference": row["preference"] if row else 1.5,
        "price_per_example": row["tokens"] * args.price_per_million / 1e6 if row else 0.0,
        "time_per_example": row["seconds"] if row else 0.0,
        "raw_completion": row["reply"] if row else None,
    }
