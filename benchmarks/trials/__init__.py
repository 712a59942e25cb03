"""Compares recipes: the effect of changes of a configuration on quality, and their cost in time.

    python -m benchmarks.trials --plan FILE --minutes M [--work DIR] [--json FILE] [--set data.root=FOLDER]
    python -m benchmarks.trials --plan FILE --archive cifar10-jpeg.tar.xz
    python -m benchmarks.trials --config digits --until mining --seeds 0 1 2 --json FILE -- \\
        "base" "one-sided: pretext.method.anchors=first"
    python -m benchmarks.trials --compare SMALL.json LARGE.json [--metric purity]

A plan (``benchmarks/plans/``) has a prediction for each trial. It is checked as a whole before anything runs. It stops
with a checkpoint when its minutes are over or on SIGTERM, and the same command goes on in the middle of the stage; the
seconds of a stage add up over its interruptions. Outcomes, new trials and more seeds may be added to a plan. What has a
result stays: settings, changes and predictions.

Without a plan, a trial is ``NAME: section.key=value ...``, or a name alone for the configuration as it is. An existing
``--json`` file is continued: only what it lacks is run.

All trials of the first seed come first, then those of the second. Stages that trials share run once (their folders are
in ``--work``), and their cost counts for each. On a CPU the cost is CPU time of all threads of the process, so that a
busy machine matters little. On a GPU it is elapsed time, which includes choosing kernels at the first step.

Ranking: accuracy divided by time would favour doing nothing. A network with random weights has some accuracy at no
cost, so the ratio is largest for the shortest training, however bad its result. Trials are therefore ranked by their
gain over the same network untrained, per minute. A trial whose network is not trained has no rank. This measure
still prefers short trainings, because the first epochs gain the most. So the table also marks the trials that no other
one beats in accuracy and cost together (Pareto's front); for a given budget of time the best recipe is one of these. Of
different networks these marks say more than the ranks, because a network that starts lower has more to gain. A
difference is real if it exceeds the least significant one by Student's t at 5 %: t * s * sqrt(1/n + 1/m), with n and m
seeds and the standard deviation s pooled over all trials; of costs, their logarithms are compared. With one seed per
trial the spread is not known, and no difference is called real.

``--compare`` tells if trials at a reduced size order the recipes as a larger size does.

Comparing recipes uses labels; training and selection in a run never do.
"""

import time

BEGIN = time.monotonic()
"""When this process began, as far as Python can tell: before PyTorch is imported."""
