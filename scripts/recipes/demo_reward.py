"""Rule-based reward for the demo recipe: small checks that add up to a score in [0, 1].

Every term lies in [0, 1], higher is better; the reward is their weighted sum.

term         weight  what it checks                              why
-----------  ------  ------------------------------------------  ---------------------------------
on_subject   0.25    takes up the prompt's content words         a stock phrase must not win
form         0.25    has the form asked for (list, JSON, ...);   the part of "follow the prompt"
                     if none is asked, is clean prose            that a rule can verify
finished     0.20    stopped by itself, and ends like an answer  small models run on until cut off
fresh        0.10    repeats no phrases, lines or sentences      small models fall into loops
not_padded   0.10    no filler, meta talk or run-away length     length must not buy reward
substantial  0.10    has about as many words as the task needs   shortness must not buy reward

Most terms are trivially good for an answer that says nothing. So all of them are scaled by
`_effort`: it falls to 0 for a nearly empty answer and for the prompt handed back, and is lower
for a string of keywords and, on an open prompt, for an answer without any of its content words.
"""

import ast
import json
import math
import re
import warnings
from functools import lru_cache
from typing import NamedTuple

WEIGHTS: dict[str, float] = {
    "on_subject": 0.25,
    "form": 0.25,
    "finished": 0.20,
    "fresh": 0.10,
    "not_padded": 0.10,
    "substantial": 0.10,
}

_MAX_CHARS = 4000  # only this much of an answer is read, which bounds the time an answer takes
_NUMBERS = dict(zip("one two three four five six seven eight nine ten".split(), range(1, 11)))
_NUM = rf"({'|'.join(_NUMBERS)}|\d{{1,2}})"
_STOP = frozenset(
    """a about after again all also am an and any are as at be because been before
being both but by can could did do does each even every for from had has have he her hers him his
how i if in into is it its just like may me might more most must my no nor not of off on one only
or other our out over own she should so some such than that the their them then there these they
this those through to too under until up us very was we were what when where which while who whose
why will with would yes you your don't it's i'm
best different first good help here many much now people person reason reasons thing things time way
ways""".split()
)
_INSTRUCTION = frozenset(
    """act answer brief briefly bullet bulleted called code comma describe
explain extract find function give haiku json keep key keys limerick line list make name named
number numbered object paragraph play plain poem point points pretend python reply rewrite say
sentence sentences separated short show step steps suggest suggestion summarise tell text three two
four five six turn use word words write""".split()
)
_SKIPPED = _STOP | _INSTRUCTION
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['’][a-z]+)?")
_MARKED_LINE = re.compile(r"^([ \t]*)(?:(\d{1,2})[.)]|[-*•])[ \t]+(?=\S)", re.M)
_ROLE_MARKER = re.compile(
    r"<\|\w+\|>|\[/?INST\]|^\W*(?:user|assistant|human|system|AI)\s*:|^### ?"
    r"(?:instruction|response)",
    re.I | re.M,
)
_REFUSAL = re.compile(
    r"\bas an? (?:AI|language model)|^\W*i(?:'|’| a)?m sorry, but (?:i|as)\b|"
    r"^\W*i (?:can'?t|cannot) (?:help|assist)",
    re.I,
)
_FILLER = re.compile(
    r"^\W*(?:sure|certainly|of course|absolutely|great question|"
    r"i(?:'d| would) be (?:happy|glad))\b",
    re.I,
)
_PREAMBLE = re.compile(r"^[^\n]{0,60}\b(?:here(?:'s|’s| is| are))\b[^\n]{0,80}:", re.I)
_META = re.compile(
    r"\b(?:i hope (?:this|that) helps|let me know if|feel free to|in conclusion|"
    r"(?:as|like) you (?:asked|requested)|this (?:response|answer|text|rewrite|poem"
    r"|sentence|summary) (?:is|uses|has|provides|captures))\b",
    re.I,
)
_LOOP = re.compile(r"([^\s\-=_*#.]{1,6}?)\1{9}")


class Form(NamedTuple):
    """A form that a prompt asks for; `count` is 0 where the prompt leaves it open."""

    kind: str
    count: int = 0
    names: tuple[str, ...] = ()


@lru_cache(maxsize=256)
def _words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers; each CJK character counts as a word."""
    return tuple(_WORD.findall(text.lower()))


def _stem(word: str) -> str:
    """Cut a common English ending off, so that 'boiling' and 'boils' meet."""
    if len(word) <= 3:
        return word
    return re.sub(r"(?:ings?|ions?|edly|ed|es|ers?|ly|ies|s|e|y)$", "", word) or word


@lru_cache(maxsize=256)
def _content(text: str) -> frozenset[str]:
    """Stems of the words that carry the subject; numbers are among them."""
    return frozenset(
        _stem(w)
        for w in _words(_MARKED_LINE.sub("", text))
        if w not in _SKIPPED and (len(w) > 1 or w.isdigit() or not w.isascii())
    )


def _grams(words: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    """All runs of `size` words."""
    return [words[i : i + size] for i in range(len(words) - size + 1)]


def _units(text: str) -> list[str]:
    """The sentences of a text; line breaks end a sentence too, list markers are dropped."""
    text = re.sub(r"\b(Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e)\.", r"\1", text)
    parts = re.split(r"(?<=[.!?])[\"”')\]]*\s+|(?<=[。！？])|\n+", _MARKED_LINE.sub("", text))
    return [part for part in parts if _WORD.search(part)]


def _number(token: str | None) -> int:
    """The value of a matched `_NUM`, 0 for none."""
    return 0 if not token else _NUMBERS.get(token.lower()) or int(token)


def _asked_list(prompt: str) -> Form | None:
    """The list a prompt asks for: 'numbered', 'bullets', 'commas' or any 'list'."""
    marker = re.search(
        r"\b(?:(numbered|bulleted|comma-separated) list|bullet points?)"
        r"(?: of (?:exactly )?" + _NUM + r"\b)?",
        prompt,
        re.I,
    )
    counted = re.search(rf"\b{_NUM} (?:\w+ )?bullet points", prompt, re.I) or re.search(
        r"(?:^|[.!?:;,\n]\s*|\b(?:and|then|please) )(?:list|name|give|suggest) "
        rf"(?:me |the )?(?:exactly )?(?!one\b){_NUM} (?!sentence|word)",
        prompt,
        re.I,
    )
    if not marker and not counted:
        return None
    kinds = {"numbered": "numbered", "comma-separated": "commas"}
    kind = kinds.get((marker[1] or "").lower(), "bullets") if marker else "list"
    return Form(kind, _number((marker and marker[2]) or (counted and counted[1])))


def _has_text(prompt: str) -> bool:
    """Whether the prompt seems to carry a text to work on."""
    return '"' in prompt or "\n" in prompt or ": " in prompt


@lru_cache(maxsize=4096)
def asked_forms(prompt: str) -> tuple[Form, ...]:
    """The checkable forms that a prompt asks for, in no special order."""

    def find(pattern: str) -> re.Match[str] | None:
        return re.search(pattern, prompt, re.I)

    forms = []
    if m := find(r"\bwrite (?:me )?a Python function(?: (?:called|named) (\w+))?"):
        forms.append(Form("python", names=(m[1],) if m[1] else ()))
    if m := find(r"\bJSON object with the keys? ([^.:;\n]+)"):
        keys = [k for k in re.findall(r"\w+", m[1]) if k.lower() not in ("and", "the")]
        forms.append(Form("json", names=tuple(keys)))
    if m := find(rf"\b{_NUM}-line (?:poem|verse)|\b(haiku)\b|\b(limerick)\b|\b(couplet)\b"):
        forms.append(Form("lines", _number(m[1]) or (3 if m[2] else 5 if m[3] else 2)))
    if m := find(
        rf"\b(?:in|into|as|with|exactly) (?:exactly |just |only )?(?:{_NUM}|a single)"
        rf"(?: \w+)? sentences?\b|\b{_NUM}-sentence\b"
    ):
        forms.append(Form("sentences", _number(m[1] or m[2]) or 1))
    if m := find(r"\b(?:no more than|at most|under|fewer than|less than|up to) (\d{1,3}) words\b"):
        forms.append(Form("max_words", max(1, int(m[1]))))
    elif find(r"\b(?:in|with) (?:only )?one word\b"):
        forms.append(Form("max_words", 1))
    if find(r"\byes or no\b"):
        forms.append(Form("yes_no"))
    if find(r"\b(?:only|just) the number\b"):
        forms.append(Form("number"))
    if asked := _asked_list(prompt):
        forms.append(asked)
    return tuple(forms)


def _near(got: int, wanted: int) -> float:
    """1 for the number asked, about 0.5 for one off; for an open number two or more will do."""
    if wanted == 0:
        return float(got >= 2)
    return max(0.0, 1 - abs(got - wanted) / max(2, wanted / 2)) if got else 0.0


def _list_form(form: Form, text: str) -> float:
    """The number of items, less for the wrong marker; 'list' also takes plain lines or commas."""
    marks = list(_MARKED_LINE.finditer(text))
    outer = min((len(m[1]) for m in marks), default=0)
    marks = [m for m in marks if len(m[1]) == outer]  # nested items do not count
    pieces = [p for p in re.split(r",|;|\n|\band\b", text) if _WORD.search(p)]
    if form.kind == "commas":
        plain = not marks and "," in text and all(len(_words(piece)) <= 6 for piece in pieces)
        return _near(len(pieces), form.count) * (1 if plain else 0.5)
    if form.kind == "list" and not marks:
        lines = [s for s in text.splitlines() if _WORD.search(s) and not s.rstrip().endswith(":")]
        if len(lines) > 1:
            return _near(len(lines), form.count)
        return 0.8 * max(_near(len(pieces), form.count), _near(len(_units(text)), form.count))
    numbered = sum(m[2] is not None for m in marks)
    wrong = {"numbered": len(marks) - numbered, "bullets": numbered}.get(form.kind, 0)
    return _near(len(marks), form.count) * (0.6 if wrong else 1)


def _python_form(form: Form, text: str) -> float:
    """A function that parses, with the name asked for; a bare `def` earns a little."""
    start = re.search(r"^[ \t]*(?:async )?def \w+", text, re.M)
    if not start:
        return 0.1 if "def " in text else 0.0
    fenced = re.search(r"```[a-zA-Z]*\n(.*?)```", text, re.S)
    bare = re.match(r"[^\n]*(?:\n[ \t]+[^\n]*|\n(?=\s))*", text[start.start() :])
    for code in (fenced[1] if fenced else "", bare[0] if bare else ""):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(code[:3000].strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                empty = all(isinstance(n, ast.Pass | ast.Expr) for n in node.body)
                named = not form.names or node.name == form.names[0]
                return (1.0 if named else 0.7) * (0.5 if empty else 1.0)
    return 0.3


def _json_form(form: Form, text: str) -> float:
    """The first {...} parses and has the keys asked, and no others."""
    start = text.find("{")
    if start < 0:
        return 0.0
    try:
        found, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return 0.1
    wanted, got = {k.lower() for k in form.names}, {k.lower() for k in found}
    return 0.3 + 0.7 * len(wanted & got) / max(1, len(wanted | got))


def _one_form(form: Form, text: str) -> float:
    """How well an answer has one of the forms asked."""
    count = len(_words(text))
    if form.kind in ("python", "json"):
        return _python_form(form, text) if form.kind == "python" else _json_form(form, text)
    if form.kind == "lines":
        lines = [s for s in text.splitlines() if _WORD.search(s) and not s.rstrip().endswith(":")]
        prose = any(len(_words(line)) > 14 for line in lines)
        return _near(len(lines), form.count) * (0.5 if prose else 1.0)
    if form.kind == "sentences":
        answer = re.sub(r"^\W*(?:yes|no)[.,!]\s*", "", text, flags=re.I)  # "Yes. It is ..."
        return _near(len(_units(answer)), form.count)
    if form.kind == "max_words":
        return min(1.0, max(0.0, 2 - count / form.count))
    if form.kind == "yes_no":
        return 1.0 if re.match(r"\W*(?:yes|no)\b", text, re.I) else 0.0
    if form.kind == "number":
        only = re.fullmatch(r"[^\w-]*-?\d[\d,./]*\s*%?\W*", text.strip())
        return 1.0 if only else 0.4 if count <= 8 and re.search(r"\d", text) else 0.0
    return _list_form(form, text)


def _form(prompt: str, text: str) -> float:
    """The mean over the forms asked; stray role markers, refusals and open fences lower it."""
    forms = asked_forms(prompt)
    score = sum(_one_form(f, text) for f in forms) / len(forms) if forms else 1.0
    score *= 0.3 if _ROLE_MARKER.search(text) else 1.0
    score *= 0.5 if _REFUSAL.search(text) else 1.0
    return score * (0.5 if text.count("```") % 2 else 1.0)


def _expected(prompt: str) -> tuple[int, int]:
    """How many words the task needs, and how many are plenty."""
    each = {"sentences": (7, 35), "lines": (3, 12), "number": (1, 8), "yes_no": (6, 50)}
    enough, plenty = 0, 0
    for form in asked_forms(prompt):
        if form.kind in ("python", "json"):
            low, high = (8, 1000) if form.kind == "python" else (2 * len(form.names), 60)
        elif form.kind == "max_words":
            low, high = (0, 30) if enough else (min(25, (form.count + 1) // 2), form.count + 20)
        elif form.kind in each:
            low, high = (n * max(1, form.count) for n in each[form.kind])
        else:
            low, high = 2 * (form.count or 3), 90
        enough, plenty = enough + low, plenty + high
    if enough:
        return enough, min(plenty, 90) if plenty < 1000 else plenty
    closed_task = _has_text(prompt) or len(re.findall(r"\d+", prompt)) >= 2  # mostly sums
    return (6 if closed_task else 25), 1000


def _substantial(prompt: str, text: str) -> float:
    """Rises from 0 for no words to 1 for as many as the task needs."""
    return min(1.0, len(_words(text)) / _expected(prompt)[0])


def _copied(prompt: str, text: str) -> float:
    """How far an answer is the prompt handed back: 1 for a copy, 0 for own or selected words."""
    asked, given = _words(prompt), _words(text)
    size = max(1, min(4, len(asked), len(given)))
    source, answer = set(_grams(asked, size)), _grams(given, size)
    if not source or not answer:
        return 0.0
    covered = len(source.intersection(answer)) / len(source)
    held = {i + k for i, gram in enumerate(answer) if gram in source for k in range(size)}
    return min(covered, len(held) / len(given))


def _stuffed(prompt: str, text: str) -> bool:
    """Whether an answer is hardly more than a string of the prompt's keywords."""
    subject, taken, words = _content(prompt), _content(text), _words(text)
    if len(words) < 5 or any(f.kind == "json" for f in asked_forms(prompt)):
        return False
    shared = len(subject & taken)
    most = 0.6 if _has_text(prompt) else 0.3  # an extract of a text is made of its words
    function_words = sum(w in _STOP for w in words) / len(words)
    return function_words < 0.2 and shared >= 0.5 * len(taken) and shared > most * len(subject)


def _effort(prompt: str, text: str) -> float:
    """The scale of all terms: 0 for a nearly empty answer or a copied prompt, normally 1."""
    own = 1 - min(1.0, max(0.0, (_copied(prompt, text) - 0.5) / 0.4))
    own *= 0.5 if _stuffed(prompt, text) else 1.0
    if not asked_forms(prompt) and _on_subject(prompt, text) == 0:
        own *= 0.75  # where a form is asked, a stock phrase loses that already
    return min(1.0, 2 * _substantial(prompt, text)) * own


def _finished(text: str, finish_reason: str) -> float:
    """1 if the model stopped by itself and the last line ends as an answer ends."""
    last = text.rstrip().splitlines()[-1]
    closed = not last[-1].isalnum() and last[-1] not in ",;:-–—([{"
    short = len(_words(last)) <= 10 and last[-1] not in ",;:([{"  # a list item, verse, code, number
    ends_well = (closed or short) and text.count("```") % 2 == 0
    if finish_reason == "length":
        return 0.2 if closed and ends_well else 0.0
    whole = 1.0 if finish_reason == "stop" else 0.6
    return whole if ends_well else 0.5 * whole


def _fresh(text: str) -> float:
    """1 minus a smooth penalty for repeated word runs, lines, sentences and loops."""

    def repeated(items: list) -> float:
        return 1 - len(set(items)) / len(items) if items else 0.0

    words = _words(text)
    runs = (repeated(_grams(words, 3)) + repeated(_grams(words, 4))) / 2
    units = repeated([w for u in _units(text) if len(w := _words(u)) >= 3])
    worst = max(runs, units, 0.5 if _LOOP.search(text) else 0.0)
    return 1 / (1 + (worst / 0.15) ** 2)


def _on_subject(prompt: str, text: str) -> float:
    """Share of the prompt's content words taken up, full at half of them or at three."""
    subject, taken = _content(prompt), _content(text)
    forms = asked_forms(prompt)
    if not subject or any(f.kind == "number" or f == ("max_words", 1, ()) for f in forms):
        return 1.0  # such an answer need not share a word with the prompt
    usual = {"list": 1, "commas": 1, "python": 2, "lines": 2}  # bare items, code, verse: fewer
    most = min((usual.get(f.kind, 3) for f in forms), default=3)
    share = len(subject & taken) / min(most, math.ceil(len(subject) / 2))
    return 0.0 if _stuffed(prompt, text) else min(1.0, share)


def _not_padded(prompt: str, text: str) -> float:
    """1 minus what filler, meta talk, a restated prompt and run-away length cost."""
    if _REFUSAL.search(text):
        return 0.0
    first = (_units(text) or [""])[0]
    cost = 0.3 * bool(_FILLER.search(text)) + 0.2 * bool(_PREAMBLE.search(text))
    cost += min(0.4, 0.2 * len(_META.findall(text))) + 0.5 * (_copied(prompt, first) > 0.5)
    plenty = _expected(prompt)[1]
    return max(0.0, 1 - cost - min(0.6, max(0.0, len(_words(text)) / plenty - 1)))


def terms(prompt: str, response: str, finish_reason: str = "stop") -> dict[str, float]:
    """Each term of the reward for one answer, in [0, 1]; all are 0 for an answer without words."""
    text = response.strip()
    if len(text) > _MAX_CHARS:
        text = text[: _MAX_CHARS // 2] + text[-_MAX_CHARS // 2 :]
    if not _WORD.search(text):
        return dict.fromkeys(WEIGHTS, 0.0)
    scores = {
        "on_subject": _on_subject(prompt, text),
        "form": _form(prompt, text),
        "finished": _finished(text, finish_reason),
        "fresh": _fresh(text),
        "not_padded": _not_padded(prompt, text),
        "substantial": _substantial(prompt, text),
    }
    effort = _effort(prompt, text)
    return {name: effort * score for name, score in scores.items()}


def reward(prompt: str, responses: list[str], finish_reasons: list[str]) -> list[float]:
    """The reward of each answer to a prompt: the weighted sum of its terms, in [0, 1]."""
    scored = [terms(prompt, r, f) for r, f in zip(responses, finish_reasons, strict=True)]
    return [sum(WEIGHTS[name] * score for name, score in s.items()) for s in scored]


reward.terms = terms
