"""Plots as SVG elements for a page. Text stays text, and the colours are the page's own, so that a
plot follows the page from light to dark."""

import io

import numpy as np
from etils import epy

with epy.lazy_imports():  # loaded at their first use, so that --help answers at once
    import matplotlib
    from matplotlib import figure as figures
    from matplotlib import ticker

SIZE = (4.0, 2.9)  # inches: the width of a phone's screen, where letters are then 11 pixels high
SERIES = 7  # colours that the page defines; --series-0 is the start model's

# Matplotlib has no CSS variables: these stand for the page's colours until the SVG is written.
INK, LINE = "#010203", "#010204"
COLOURS = [f"#0102{10 + i}" for i in range(SERIES)]
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
}

Line = tuple[str, int, str, list[float], list[float]]  # label, colour, matplotlib's style, x, y


def lines(title: str, drawn: list[Line], level: tuple[float, str] | None):
    """Lines over the optimizer's steps. level: a horizontal line and its meaning. A line of many
    points is drawn as their moving mean, with the points faint behind it."""
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=SIZE)
        axes = figure.subplots()
        if level is not None:
            axes.axhline(level[0], color=INK, linewidth=0.8, linestyle=":", label=level[1])
        for label, colour, style, x, y in drawn:
            colour, window = COLOURS[colour], len(y) // 20
            if window > 1 and style in ("-", "--"):
                axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
                y = np.convolve(y, np.ones(window) / window, "valid")
                x = x[window - 1 :]
            axes.plot(x, y, style, color=colour, linewidth=1.6, markersize=4, label=label)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if any(label and label[0] != "_" for label, *_ in drawn) or level:
            figure.legend(loc="outside lower left", ncols=3)
        return _svg(figure, title)


def histograms(title: str, series: list[tuple[str, int, list[float]]]):
    """Histograms of (label, colour, values) below each other on one scale, with their means."""
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(SIZE[0], 0.75 + 0.62 * len(series)))
        rows = figure.subplots(len(series), sharex=True, squeeze=False)[:, 0]
        everything = np.concatenate([values for _, _, values in series])
        low, high = float(everything.min()), float(everything.max())
        bins = np.linspace(low, high if high > low else low + 1, 25)
        for axes, (label, colour, values) in zip(rows, series):
            axes.hist(values, bins=bins, color=COLOURS[colour], alpha=0.55)
            axes.axvline(np.mean(values), color=INK, linewidth=1.4)
            axes.set_yticks([])
            axes.grid(False)
            axes.spines["left"].set_visible(False)
            axes.set_title(f"{label}: mean {np.mean(values):.3g}", fontsize=9, pad=2)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
        return _svg(figure, title)


def _svg(figure, title: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    series = {colour: f"var(--series-{i})" for i, colour in enumerate(COLOURS)}
    for stand_in, colour in {INK: "currentColor", LINE: "var(--line)", **series}.items():
        text = text.replace(stand_in, colour)
    return text
