"""The bundle's graphs in memory: loading, saving, describing, marks, and the few rewrites that everything shares."""
