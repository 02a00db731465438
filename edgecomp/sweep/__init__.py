"""`edgecomp sweep`: every combination of method, budget and site, measured beside random and pooled tokens.

planning: combinations to plans of one bundle; the only part that needs the compiler's packages.
job: what is to be measured and what has been, as files of the sweep's folder.
worker: measuring one plan, in a process of its own.
selector: what choosing takes, from onnxruntime's own timings.
running: the processes, the order, the progress; going on where a run was ended.
tables: rows of figures, their CSV and JSON, the report page.

    FOLDER/sweep.job.json   the plans to measure and how
    FOLDER/bundle           one bundle with all of them
    FOLDER/cells/PLAN.json  what was measured of a plan, and with what
    FOLDER/sweep.csv, sweep.json, report.html
"""
