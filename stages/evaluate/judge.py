"""Judge two files of answers with a model behind an OpenAI-compatible endpoint, as AlpacaEval 2.0.

model_outputs.json (or samples.jsonl) + the reference's → annotations.json

    python -m stages.evaluate judge --outputs best.json --reference gpt4_1106_preview.json \\
        --out annotations.json
"""

import dataclasses
import email.utils
import importlib.metadata
import json
import math
import os
import random
import shlex
import threading
import time
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait

import httpx2
import tenacity
from tqdm import tqdm

from sharding.errors import UserError, check_least
from stages.evaluate.answers import read_both
from stages.files.benchmarks import ModelOutput
from stages.files.output import Manifest, Output, an_input
from stages.files.paths import text_sha256
from stages.files.run import stop_signal

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
PROMPT = "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
INSTALL = "pip install alpaca_eval==0.6.6 'setuptools<81'"  # it imports pkg_resources
FIRST_PAUSE = 1.0  # seconds before the first retry; each further pause is twice as long
LONGEST_PAUSE = 60.0  # seconds
LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more ends the run
CHECK_EVERY = 0.5  # seconds between two looks at whether a signal says stop
RETRIED = (408, 409, 429, 500, 502, 503, 504)  # HTTP statuses that may go away by themselves


@dataclasses.dataclass
class Judge:
    """The preferences of AlpacaEval 2.0: its own prompt, and the judge's log-probs of two tokens.

    The prompt is read from the installed package alpaca_eval. As there, a coin drawn from the
    instruction says which answer the judge sees first. A preference is 2 − P(m) / (P(m) + P(M)): 2
    where the model's answer is better, 1 where the reference's is. Equal answers count as 1.5 and
    are not sent. The key is read from OPENAI_API_KEY. Every reply is kept in OUT.partial, so that a
    stopped run pays for no request twice.
    """

    outputs: str
    """The model's answers: a model_outputs.json or samples.jsonl."""
    reference: str
    """The reference's answers; the leaderboard uses those of gpt4_1106_preview."""
    out: str
    """The annotations.json to write, in AlpacaEval's form."""
    model: str = "gpt-4-1106-preview"
    """The name of the judge."""
    endpoint: str = "https://api.openai.com/v1"
    """The address of the server, without /chat/completions."""
    response: int = 0
    """The response taken from each row of a samples.jsonl, counted from 0."""
    common_only: bool = False
    """Judge only the instructions that both files answer, instead of refusing other files."""
    price_per_million: float = 10.0
    """Dollars per million tokens of prompt and reply, as AlpacaEval counts them."""
    parallel: int = 4
    """Requests at the same time."""
    retries: int = 8
    """How often a failed request is sent again, after 1, 2, 4, … seconds (at most 60), or after the
    time that the server asks for (Retry-After)."""
    timeout: float = 60.0
    """Seconds to wait for a reply."""
    overwrite: bool = False
    """Replace --out if it exists."""


def main(args: Judge) -> None:
    # ------------------------------------------------------------------------------ inputs
    _check(args)
    template = prompt_template()
    files = args.outputs, args.reference
    pairs, names, counts = read_both(files, args.response, args.common_only)

    # ------------------------------------------------------------------------------ output
    inputs = {"outputs": an_input(args.outputs), "reference": an_input(args.reference)}
    manifest = Manifest(
        stage="evaluate judge",
        arguments={"model": args.model, "response": args.response},
        inputs=inputs,
        identities={"prompt": text_sha256(template), "outputs": inputs["outputs"]["sha256"]},
    )
    output = Output.open(args.out, manifest, args.overwrite)
    if output.finished:
        return

    # ------------------------------------------------------------------------------ judge
    ask_all(args, template, pairs, output)

    # ------------------------------------------------------------------------------ finish
    replies = {row["prompt_id"]: row for row, _ in output.rows()}
    rows = [_annotation(args, pair, names, replies.get(pair[0].key)) for pair in pairs]
    preferences = [row["preference"] - 1 for row in rows if row["preference"] is not None]
    if len(preferences) < len(rows):
        name = "without a preference (the reply began with neither m nor M)"
        counts[name] = len(rows) - len(preferences)
    tokens = sum(row["tokens"] for row in replies.values())
    price = sum(row["price_per_example"] for row in rows)
    results = {
        "requests": len(replies),
        "tokens": tokens,
        "price": price,
        "win_rate": 100 * sum(preferences) / len(preferences) if preferences else None,
    }
    output.finish_as(rows, counts, results)
    print(
        f"{len(replies)} judgements, {tokens} tokens, ${price:.2f}; now: python -m stages.evaluate "
        f"score --annotations {shlex.quote(args.out)} --out …"
    )


def _check(args: Judge) -> None:
    check_least(args, parallel=1, retries=0, response=0, price_per_million=0)
    if args.timeout <= 0:
        raise UserError(f"--timeout is {args.timeout}: give a number of seconds above 0")
    try:
        scheme = httpx2.URL(args.endpoint).scheme
    except httpx2.InvalidURL as error:
        raise UserError(f"--endpoint {args.endpoint}: {error}") from None
    if scheme not in ("http", "https"):
        raise UserError(f"--endpoint {args.endpoint}: it must begin with http:// or https://")
    if not os.environ.get("OPENAI_API_KEY", "").isascii():
        raise UserError("OPENAI_API_KEY holds other characters than ASCII: copy the key again")


def official_command(outputs: str, reference: str | None = None) -> str:
    """The command of AlpacaEval's own judgement of a file of ours."""
    command = f"alpaca_eval --model_outputs {shlex.quote(outputs)}"
    command += f" --reference_outputs {shlex.quote(reference)}" if reference else ""
    return f"{command} --annotators_config {ANNOTATOR}    # {INSTALL}"


# ------------------------------------------------------------------------------- the prompt


def prompt_template() -> str:
    """AlpacaEval 2.0's prompt, read from the installed package without importing it."""
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
    """The messages of one judgement, built as alpaca_eval builds them: each placeholder is replaced
    once, in this order, and the ChatML text is then cut into messages."""
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
    """2 − P(m) / (P(m) + P(M)) for the reply's first token, so 2 where the second answer is better;
    None where neither is among the likeliest tokens (completion_parsers.logprob_parser)."""
    top = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    weights = {t["token"]: math.exp(t["logprob"]) for t in top if t["token"] in ("m", "M")}
    total = sum(weights.values())
    if not math.isfinite(total):
        raise ValueError("a log-prob is not finite")
    return 2 - weights.get("m", 0.0) / total if total > 0 else None


# ------------------------------------------------------------------------------ the endpoint


def ask_all(
    args: Judge, template: str, pairs: list[tuple[ModelOutput, ModelOutput]], output: Output
) -> None:
    """Write a row {prompt_id, reply, preference, tokens, seconds} for each pair that has none."""
    todo = [(a, b) for a, b in pairs if a.text != b.text and not output.has(a.key)]
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    stopping = threading.Event()  # once it is set, no request is sent
    spent = sum(row["tokens"] for row, _ in output.rows())
    progress = tqdm(total=len(pairs), initial=len(pairs) - len(todo), unit=" pairs", desc="judge")
    with (
        progress,
        stop_signal() as check_stop,
        httpx2.Client(headers=headers, timeout=args.timeout) as client,
    ):

        def ask_or_stop(ours: ModelOutput, theirs: ModelOutput) -> dict:
            switched = is_switched(ours.key)
            texts = (ours.text, theirs.text) if switched else (theirs.text, ours.text)
            try:
                row = ask(args, client, chat(template, ours.key, *texts), stopping)
            except BaseException:
                stopping.set()  # at once, before this thread takes the next pair from the queue
                raise
            if switched and row["preference"] is not None:
                row["preference"] = 3 - row["preference"]  # 2 where our answer is better
            return {"prompt_id": ours.key} | row

        pool = ThreadPoolExecutor(args.parallel)
        waiting = {pool.submit(ask_or_stop, *pair) for pair in todo}
        try:
            while waiting:
                check_stop()  # also while no reply comes: a server may ask to wait for minutes
                finished, _ = wait(waiting, CHECK_EVERY, return_when=FIRST_COMPLETED)
                for future in finished:
                    waiting.remove(future)
                    try:
                        row = future.result()
                    except CancelledError:  # not sent, since another request failed
                        continue
                    output.write(row)
                    spent += row["tokens"]
                    dollars = spent * args.price_per_million / 1e6
                    progress.set_postfix_str(f"${dollars:.2f}", refresh=False)
                    progress.update()
        finally:
            # After any exception the queued requests are not sent. Those under way are paid for,
            # so they are awaited and kept.
            stopping.set()
            pool.shutdown(cancel_futures=True)
            for future in waiting:
                if not future.cancelled() and future.exception() is None:
                    output.write(future.result())


def ask(
    args: Judge, client: httpx2.Client, messages: list[dict], stopping: threading.Event
) -> dict:
    """One judgement: {reply, preference: 2 where the second answer is better, tokens, seconds}."""
    body = {
        "model": args.model,
        "messages": messages,
        "max_tokens": 1,
        "temperature": 1,
        "top_p": 1.0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    start = time.monotonic()
    reply = _post(args, client, body, stopping)
    try:
        return {
            "reply": reply["choices"][0],
            "preference": preference(reply),
            "tokens": int((reply.get("usage") or {}).get("total_tokens") or 0),
            "seconds": time.monotonic() - start,
        }
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{args.endpoint}: the reply has no choices[0].logprobs.content[0].top_logprobs that "
            f"can be read ({error!r} in {json.dumps(reply)[:200]}): the judge must be a server "
            "that gives log-probs"
        ) from None


class RequestFailed(Exception):
    """A request failed; `again`: it may be sent again, after `retry_after` seconds where the server
    asks for that."""

    def __init__(self, problem: str, again: bool, retry_after: float | None = None):
        super().__init__(problem)
        self.again, self.retry_after = again, retry_after


def _post(args: Judge, client: httpx2.Client, body: dict, stopping: threading.Event) -> dict:
    """The server's reply as JSON. UserError once retrying is of no use; CancelledError where
    `stopping` is set before the request is sent."""
    url = f"{args.endpoint.rstrip('/')}/chat/completions"

    def once() -> dict:
        if stopping.is_set():
            raise CancelledError
        try:
            response = client.post(url, json=body)
            if response.status_code == 200:
                return response.json()
        except (httpx2.HTTPError, ValueError, RecursionError) as error:  # no network, no JSON
            raise RequestFailed(repr(error), again=True) from error
        problem = f"HTTP {response.status_code}: {' '.join(response.text.split())[:200]}"
        asked = retry_after(response.headers)
        if asked is not None and asked > LONGEST_RETRY_AFTER:
            raise RequestFailed(f"{problem} (Retry-After: {asked:.0f} seconds)", again=False)
        raise RequestFailed(problem, response.status_code in RETRIED, asked)

    growing = tenacity.wait_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)

    def pause(state: tenacity.RetryCallState) -> float:
        asked = state.outcome.exception().retry_after
        return growing(state) if asked is None else asked

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, RequestFailed) and e.again),
        stop=tenacity.stop_after_attempt(args.retries + 1),
        wait=pause,
        sleep=tenacity.sleep_using_event(stopping),
        reraise=True,
    )
    try:
        return retrying(once)
    except RequestFailed as error:
        raise UserError(
            f"{url}: {error}: what was judged is kept, and the same command goes on once the "
            "endpoint, --model and OPENAI_API_KEY are right"
        ) from None


def retry_after(headers) -> float | None:
    """The seconds that a server asks to wait (RFC 9110, 10.2.3); None where it does not say."""
    value = headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _annotation(
    args: Judge, pair: tuple[ModelOutput, ModelOutput], names, row: dict | None
) -> dict:
    """A row of annotations.json as alpaca_eval writes it. row: the kept reply; None for equal
    answers, which are not sent."""
    ours, theirs = pair
    row = row or {"preference": 1.5, "tokens": 0, "seconds": 0.0, "reply": None}
    return {
        "instruction": ours.key,
        "output_1": theirs.text,
        "generator_1": names[1],
        "dataset": theirs.dataset or ours.dataset,
        "output_2": ours.text,
        "generator_2": names[0],
        "annotator": ANNOTATOR if args.model == "gpt-4-1106-preview" else args.model,
        "preference": row["preference"],
        "price_per_example": row["tokens"] * args.price_per_million / 1e6,
        "time_per_example": row["seconds"],
        "raw_completion": row["reply"],
    }
