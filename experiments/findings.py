"""What the figures say of each claim: holds, does not hold, or the spread is too large to tell."""

import dataclasses
import statistics

HOLDS, FAILS, MISSING = "holds", "does not hold", "not run yet"
UNSURE, TOO_FEW = "the spread is too large to tell", "too few seeds to tell"
SEEDS_NEEDED = 3


@dataclasses.dataclass(frozen=True)
class Claim:
    """`better` has a smaller figure than `worse`; both are names of steps with {seed}, `figure` a column.

    sentence: the claim, as a full sentence.
    """

    sentence: str
    better: str
    worse: str
    figure: str = "feature_distance"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim with its figures: those of both sides and their differences, by seed."""

    claim: Claim
    word: str
    better: list
    worse: list

    def sentence(self):
        """Return the finding as one sentence with its figures."""
        start = f"{self.claim.sentence}: **{self.word}**"
        if self.word == MISSING:
            return f"{start}."
        differences = [w - b for b, w in zip(self.better, self.worse, strict=True)]
        return (f"{start} ({summary(self.better)} against {summary(self.worse)}, difference {summary(differences)}; "
                f"{seeds_text(len(differences))}).")


def seeds_text(count):
    """Return `3 seeds`, `1 seed`."""
    return f"{count} seed{'s' if count > 1 else ''}"


def by_seed(rows, name, figure):
    """Return {seed: figure} of the rows whose name is `name` with {seed} filled in."""
    seeds = {int(row["seed"]) for row in rows.values()}
    found = {seed: rows.get(name.format(seed=seed)) for seed in sorted(seeds)}
    return {seed: row[figure] for seed, row in found.items() if row and row[figure] is not None}


def of_common_seeds(rows, names):
    """Return the rows of the seeds that all of `names` have, names without any row left out.

    Means over different seeds cannot be compared: a table shows one set of seeds.
    """
    seeds = [set(by_seed(rows, name, "digest")) for name in names]
    common = set.intersection(*filter(None, seeds)) if any(seeds) else set()
    return {name: row for name, row in rows.items() if int(row["seed"]) in common}


def judge(claim, rows):
    """Return the `Verdict` of a claim: told only where all seeds agree and the mean exceeds the spread.

    The spread is the standard deviation, over the seeds, of the difference between the two sides, which share what
    they can (1-flow, pairs, noise). Fewer than three seeds tell nothing.
    """
    better, worse = (by_seed(rows, name, claim.figure) for name in (claim.better, claim.worse))
    seeds = sorted(better.keys() & worse.keys())
    values = [better[seed] for seed in seeds], [worse[seed] for seed in seeds]
    if not seeds:
        return Verdict(claim, MISSING, *values)
    differences = [worse[seed] - better[seed] for seed in seeds]
    word = UNSURE if len(seeds) >= SEEDS_NEEDED else TOO_FEW
    if word == UNSURE and abs(statistics.mean(differences)) > statistics.stdev(differences):
        if min(differences) > 0:
            word = HOLDS
        elif max(differences) < 0:
            word = FAILS
    return Verdict(claim, word, *values)


def summary(values):
    """Return `mean ± standard deviation` of the values, or the one value."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {statistics.stdev(values):.2g}"


LINE, ABLATION = "digits/seed{seed}/", "digits/seed{seed}/ablation/"
ONE = "/euler-1"
MAIN_CLAIMS = (
    Claim("Reflow makes ways straighter: the small 2-flow's straightness is below the 1-flow's",
          LINE + "2_flow_annealed/straightness", LINE + "1_flow/straightness", "straightness"),
    Claim("In one step the small 2-flow is better than the 1-flow of four times its size",
          LINE + "2_flow_annealed" + ONE, LINE + "1_flow" + ONE),
    Claim("A small 2-flow that is annealed is better, in one step, than one trained on the pairs from nothing",
          LINE + "2_flow_annealed" + ONE, LINE + "2_flow_from_nothing" + ONE),
    Claim("At the 1-flow's width, annealing is better than training on the pairs from nothing",
          LINE + "2_flow_wide_annealed" + ONE, LINE + "2_flow_wide_from_nothing" + ONE),
    Claim("At the 1-flow's width, starting from the 1-flow is better than annealing from nothing",
          LINE + "2_flow_wide_from_1_flow" + ONE, LINE + "2_flow_wide_annealed" + ONE),
    Claim("Distillation improves on the 2-flow in one step (naive distillation)",
          LINE + "distilled_naive" + ONE, LINE + "2_flow_annealed" + ONE),
    Claim("Guidance with the student's first step (the released code) is better than naive distillation",
          LINE + "distilled_guided_student" + ONE, LINE + "distilled_naive" + ONE),
    Claim("Guidance with the teacher's first step (the paper's equation) is better than naive distillation",
          LINE + "distilled_guided_teacher" + ONE, LINE + "distilled_naive" + ONE),
    Claim("The teacher's first step is better than the student's",
          LINE + "distilled_guided_teacher" + ONE, LINE + "distilled_guided_student" + ONE),
    Claim("One step of the guided small network is still behind the 1-flow solved by rk45",
          LINE + "1_flow/rk45", LINE + "distilled_guided_student" + ONE),
)
CONFIRMED = {HOLDS: "confirmed", FAILS: "refuted"}
# What a first run of the released code on digits saw (one-step distances, one seed), as claims of the main line.
EARLIER_RUN = (
    ("no gain from annealing (0.402, from nothing 0.354)",
     Claim("", LINE + "2_flow_from_nothing" + ONE, LINE + "2_flow_annealed" + ONE)),
    ("a small gain from guidance (0.257, naive distillation 0.267)",
     Claim("", LINE + "distilled_guided_student" + ONE, LINE + "distilled_naive" + ONE)),
)


def earlier_run_sentence(rows):
    """Return what the seeds here say of a first run of the released code."""
    said = []
    for saw, claim in EARLIER_RUN:
        verdict = judge(claim, rows)
        word = CONFIRMED.get(verdict.word, "neither confirmed nor refuted")
        count = len(verdict.better)
        less = sum(b < w for b, w in zip(verdict.better, verdict.worse, strict=True))
        said.append(f"{saw}: {word}, the same sign in {less} of {seeds_text(count)}")
    return f"A first run of the released code on digits, with a single seed, saw {'; and '.join(said)}."


def second_set_sentence(rows, title, name):
    """Return whether the image set `name` agrees with digits on the claims that it has figures for, or None."""
    agree, disagree = 0, []
    for claim in MAIN_CLAIMS:
        other = dataclasses.replace(claim, better=claim.better.replace("digits/", f"{name}/"),
                                    worse=claim.worse.replace("digits/", f"{name}/"))
        first, second = judge(claim, rows), judge(other, rows)
        if MISSING in (first.word, second.word):
            continue
        signs = {statistics.mean(v.worse) > statistics.mean(v.better) for v in (first, second)}
        agree += len(signs) == 1
        disagree += [claim.sentence] if len(signs) == 2 else []
    if not agree and not disagree:
        return None
    text = (f"{title}, one seed, which by itself tells no claim, differs in the direction that the digits' mean does "
            f"in {agree} of the {agree + len(disagree)} claims that it has figures for")
    return text + (f"; not in: {'; '.join(disagree)}." if disagree else ".")


ABLATION_CLAIMS = (
    Claim("Annealing over half of the updates is better than over a quarter",
          ABLATION + "annealing_500" + ONE, LINE + "2_flow_annealed" + ONE),
    Claim("Annealing over all updates is worse than over a quarter",
          LINE + "2_flow_annealed" + ONE, ABLATION + "annealing_1000" + ONE),
    Claim("The cosine is better than the line", ABLATION + "shape_cos" + ONE, LINE + "2_flow_annealed" + ONE),
    Claim("The exponential is better than the line", ABLATION + "shape_exp" + ONE, LINE + "2_flow_annealed" + ONE),
    Claim("500 pairs are worse than 4,000", LINE + "2_flow_annealed" + ONE, ABLATION + "count_500" + ONE),
    Claim("8,000 pairs are better than 4,000", ABLATION + "count_8000" + ONE, LINE + "2_flow_annealed" + ONE),
    Claim("Pairs by rk45 at 1e-4 make a better student than at 1e-2",
          ABLATION + "solver_rk45_0.0001" + ONE, LINE + "2_flow_annealed" + ONE),
    Claim("Pairs by rk45 at 1e-3 make a better student than at 1e-2",
          ABLATION + "solver_rk45_0.001" + ONE, LINE + "2_flow_annealed" + ONE),
    Claim("Pairs by eight steps of Heun (15 evaluations) make a worse student than rk45 at 1e-2",
          LINE + "2_flow_annealed" + ONE, ABLATION + "solver_heun_8" + ONE),
    Claim("Pairs by four steps of Heun (7 evaluations) make a worse student than rk45 at 1e-2",
          LINE + "2_flow_annealed" + ONE, ABLATION + "solver_heun_4" + ONE),
    Claim("Pairs by four steps of Euler make a worse student than rk45 at 1e-2",
          LINE + "2_flow_annealed" + ONE, ABLATION + "solver_euler_4" + ONE),
    Claim("U-shaped times are better than uniform ones", ABLATION + "time_u_shaped" + ONE,
          LINE + "2_flow_annealed" + ONE),
    Claim("The pseudo-Huber distance is better than the square", ABLATION + "loss_huber" + ONE,
          LINE + "2_flow_annealed" + ONE),
    Claim("The pseudo-Huber distance with U-shaped times is better than the square with uniform ones",
          ABLATION + "huber_u_shaped" + ONE, LINE + "2_flow_annealed" + ONE),
)
RECIPE_CLAIMS = (
    Claim("With the recommended recipe the 1-flow, solved by rk45, is better than with the released hyper-parameters",
          LINE + "recipe_recommended/1_flow/rk45-0.001", LINE + "recipe_released/1_flow/rk45-0.001"),
    Claim("With the recommended recipe the small 2-flow is better in one step",
          LINE + "recipe_recommended/2_flow" + ONE, LINE + "recipe_released/2_flow" + ONE),
    Claim("With the recommended recipe the distilled network is better in one step",
          LINE + "recipe_recommended/distilled" + ONE, LINE + "recipe_released/distilled" + ONE),
)
