"""The prose of docs/stability.md that does not depend on results, and what we think of results that differ."""

NOTES: dict[tuple[str, str], str] = {}
"""By method and model, as ("gc", "large"): why the paper's words may not be seen here; shown where they are not."""

HEAD = """\
# Stability: what keeps a ranker from diverging

The study of "Improving Training Stability for Multitask Ranking Models in Recommender Systems" (Tang et al., KDD
2023, arXiv 2302.09178) made again in public, and gone on with: its methods and models on a generated stream, what
came after it, and three real logs. This page is made by `python benchmarks/stability/page.py` from the results in
`benchmarks/stability/`; every number and every judgment on it is computed from them, so that a new run changes the
page. `make paper` makes all of it; a [small part](../benchmarks/stability/README.md) takes under ten minutes.
"""

MEASURED = """\
A **ladder** trains every method at several learning rates and seeds on one model and one stream. Each run learns the
log once, in time order (the generated stream's rows are shuffled within windows of 65,536), and scores every window
before it learns from it. A rate is **chosen** on the windows between 60 and 80 % of the log and **reported** on those
of the last 20 %, so that no number was picked on what it is reported on.

- **Quality** is the mean AUC of the binary tasks. NRMSE is the mean RMSE of the regressions over that of a constant.
  Windows that a run never reached, since it had diverged, count as a constant's: .5 and 1.
- **Unstable** is a run that *diverged* (it learned, and ended no better than a constant), *never learned* (half of
  the tasks that others learn were never better than a constant), or *collapsed* (above its best rate, it keeps less
  than half of what the same seed gains over a constant there). The verdicts are [the instruments'
  own](instruments.md#verdicts). A task that still ranks (AUC above .55) while its log loss is worse than a constant's
  is *miscalibrated*, which counts as stable.
- **1x** is a method's own best rate, **2x** the first rate of its ladder at least twice as high.
- **The largest stable rate** of a seed is the last rung before the first unstable one, going up from the best rate;
  "≥" says that the ladder ended first. Ratios of two methods are geometric means over the seeds that both have, with
  Student's 95 % interval over seeds. The true bound lies up to a rung higher, on both sides of a ratio: "the rungs
  allow" says what that may make of it. Seeds that are unstable even at the best rate are left out of a ratio, and
  counted. Between methods whose gradients differ in size (AGC and GC hold Adagrad's accumulator near its start) a
  rate is not the same thing, so that how far a rate may be missed says more.
- **How far the rate may be missed** is the range of rates about the best one whose mean AUC is within .01 of it.
- **Differences** are paired by seed (the same weights and the same stream on both sides), with Student's 95 %
  interval; "±" behind a difference is half of that interval, behind a level it is the standard deviation over seeds.
  Counts have the exact interval of Clopper and Pearson. Intervals are not corrected for how many there are: of twenty
  that hold a zero difference, one leaves it out by chance.
- **Effective rate** is how far a step moved a weight matrix, relative to its size (the median of the second half).
"""

LIMITS = """\
- **Size.** The paper's models at an eighth of their width, one generated stream, 500 steps of 256 rows (the logs: one
  pass). The paper trains 57 to 68 million dense weights with batches of 65 thousand on Google's logs. What is said of
  its methods is said of these small ones; a factor of Clippy shrinks with width, for one.
- **Length.** 500 steps are the beginning of a training. Adagrad's rates fall as it goes on, and what is best after
  500 steps need not be best after a day. `bound.toml` has one arm of 2,000 steps.
- **float32 on a CPU.** No GPU was to be had for this study. bfloat16 is another question, and was not asked.
- **One machine.** Times were taken while two cells ran beside one another on two shared cores: ratios of time mean a
  little, seconds nothing.
- **Verdicts** have thresholds of their own (what is a constant, how many windows make a divergence). Another
  definition moves the counts; quality does not depend on it.
- **Incidents** and the single runs were trained in the order of the log, so that an incident is a moment; all else on
  the generated stream with 65,536 rows shuffled at a time. The ladder of the incidents has its own undisturbed runs.
- **Tables** have plain Adagrad throughout, as in the paper, but for the one row that says otherwise.
- **What was tuned.** The limits of GC and AGC on a seed that is used nowhere else, among the paper's three values.
  Clippy's thresholds were not tuned for each model: 0.5 and 0.01 are the paper's, 0.1 and 0.001 came from trials on a
  stream of this generator before this study ([log](log.md)), so that they may suit it.
- **Ladders** of Large and Small are coarser than that of Large+DCN; a range on one may end at a rate that another
  lacks.
"""

LOGS = """\
KuaiRand (short videos, Gao et al., CIKM 2022; CC BY-SA 4.0), Online Retail (order lines of a wholesaler, UCI; CC BY
4.0) and flights out of New York in 2013 (nycflights13; CC0); [recipes](../recipes/README.md) say how each is made.
The recipe's own features, with a trunk of 4 × 256 and two cross layers without layer norm, so that it can diverge.
"""

TABLE2 = """\
Each method at its own best rate (1x) and at twice that (2x): mean AUC over seeds ± standard deviation, NRMSE, and
unstable runs as diverged / never learned / collapsed. Beside it what the paper says, and whether that is seen here,
part by part: *fine* is no unstable run, and at 2x no more than .01 AUC below 1x; *worse*, *better* and *below* are
intervals that leave 0 out. Only the first five methods are in the paper, whose 1x and 2x are of one rate for all.
"""

TUNING = """\
The limits that the paper searched, each at three rates, on a seed that no other ladder has. The setting with the best
validation AUC (bold) is the one that the ladders above use, with rates moved as far as the limit.
"""

ABLATION = """\
Plain Adagrad at one rate at which the largest model is unstable. Collapsed is here to keep less than half of what
Clippy (0.5, 0.01) gains over a constant on the same arm, rate and seed. p is Fisher's exact test, two-sided.
"""

MODERN = """\
Clips and optimizers that came after the paper with the settings of their own papers, other forms of Clippy, and what
is said to help beside the optimizer, on Large+DCN. Each stands beside its plain form: at the best rate of each and,
averaged, at the rates that both have. Differences are paired by seed.
"""

BOUND = """\
Where Clippy's bound sets the step, the rate no longer does. Here is how far that goes: the rates within .01 AUC of
the best one, for Adam with and without clipping, wherever they were tried.
"""

RUNS = """\
Large+DCN, 1,000 steps with the rows in the order of the log, looked at every fifth step. For five steps in the middle
the rating comes thirty times as large, but in the first run. Same seed, same stream.
"""
