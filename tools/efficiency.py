"""
What a figure is worth in data (paper, data efficiency): how many times the tokens used a reference, trained
on more and more of them, needs for the same figure.

python -m tools.efficiency loss=3.0034 piqa=0.6823      by the paper's reference, times the 100M tokens used
python -m tools.efficiency --curve=FILE.csv loss=1.81   by a curve of your own, times the tokens in its first
                                                        row: a header, tokens, then any columns of figures
The paper's figures: loss (nats per token); piqa, arc_easy and sciq, accuracies (acc, from 0 to 1), and mean,
that of these three.
"""
import csv
import itertools
import math
import sys

from infra.console import fail, print0, script

REFERENCE = {       # the paper's: nanochat's loss, the best of three depths, and accuracies, means over runs
    "tokens": [100e6, 200e6, 400e6, 600e6, 800e6, 1.0e9, 1.2e9, 1.4e9, 1.6e9, 1.8e9, 2.0e9],
    "loss": [4.7324, 3.8834, 3.3673, 3.1999, 3.1257, 3.0462, 3.0026, 2.9668, 2.9470, 2.9126, 2.8917],
    "piqa": [.5586, .6086, .6426, .6533, .6701, .6723, .6763, .6767, .6788, .6859, .6919],
    "arc_easy": [.3030, .3676, .4286, .4550, .4790, .4832, .4777, .5046, .5041, .5123, .5260],
    "sciq": [.2977, .5740, .7070, .7520, .7577, .7740, .7747, .7897, .7967, .7993, .8087],
    "mean": [.3864, .5167, .5927, .6201, .6356, .6432, .6429, .6570, .6599, .6659, .6755],
}


def number(text):
    """A finite float. Raises ValueError."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text!r} is not finite")
    return value


def multiple(tokens, figures, figure):
    """
    At how many times tokens[0] a curve, linear between its points, first has this figure; None: nowhere.
    """
    for (t, y), (next_t, next_y) in itertools.pairwise(zip(tokens, figures)):
        if min(y, next_y) <= figure <= max(y, next_y):
            part = (figure - y) / (next_y - y) if y != next_y else 0
            return (t + part * (next_t - t)) / tokens[0]
    return None


def read_curve(path):
    """Column -> its numbers, by rising tokens. Exits with code 2 where the file has another form."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            names, *rows = csv.reader(f, skipinitialspace=True)
        points = sorted([number(x) for x in row] for row in rows if row)
        good = names[0] == "tokens" and len({tokens for tokens, *_ in points}) == len(points) > 1
        if not good or points[0][0] <= 0 or {len(point) for point in points} != {len(set(names))}:
            raise ValueError("no tokens and figures in two rows or more, or two of one number or name")
    except (ValueError, csv.Error) as e:
        fail(f"curve={path}: is not a table of numbers ({e}): its first line must be tokens,NAME,...")
    return dict(zip(names, zip(*points)))


@script
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())         # none under python -OO
        return
    curve, asked = REFERENCE, []
    for word in argv:
        name, _, value = word.partition("=")
        if name == "--curve":
            curve = read_curve(value)
        else:
            asked.append((name, value))
    if not asked:
        fail(f"give a figure, NAME=VALUE, of {', '.join(n for n in curve if n != 'tokens')}")
    for name, value in asked:
        if name not in curve or name == "tokens":
            fail(f"'{name}={value}': write NAME=VALUE, of {', '.join(n for n in curve if n != 'tokens')}")
        try:
            times = multiple(curve["tokens"], curve[name], number(value))
        except ValueError:
            fail(f"{name}={value}: must be a finite number")
        low, high = min(curve[name]), max(curve[name])
        print0(f"{name} {value}: " + (f"outside the curve, {low:g} to {high:g}" if times is None else
                                      f"{times:.3f} times the tokens"))


if __name__ == "__main__":
    main()
