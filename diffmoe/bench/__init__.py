"""Speed and memory of training, sampling and one forward: systems side by side, and beside the authors' code.

    cases.py      what is timed: a workload, size, system and batch, and the run that it stands for
    timing.py     the clock, the ceilings of the machine, memory
    subjects.py   a case that stands ready to be called: our trainer, our sampler, our network
    reference.py  the same for a checkout of the authors' repository
    capacity.py   thresholds that give dynamic inference a chosen load
    parts.py      one step taken apart, each part with its operations and bytes
    runner.py     builds what fits together, times it in rounds, survives what does not fit
    startup.py    import, build and compile in a fresh process, without and with a warm cache
    record.py     the record of one call
    report.py     table, targets and figures from records
"""
