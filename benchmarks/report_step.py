def report_section(runs, plots): return ""
