"""`afd bench`: load on any OpenAI-compatible server, and what its clients saw.

What lives here: prompts, the load generator and its HTTP client, statistics, the search for the highest load that holds a
promise, the sweep over loads with its plot. What does not: any server, ours included; it is met over HTTP like another's.
Names of options, metrics and JSON keys are those of `vllm bench serve` where it has the thing. Called by cli and by the
scripts of benchmarks/.

    command -> dataset  (what is asked)
            -> generator -> client -> outcome  (asking it, at its time; how each request ended)
            -> statistics -> report  (numbers, and how a person reads them)
            -> sla, pareto, plot  (many runs)
"""
