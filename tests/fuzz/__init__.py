"""Inputs that nobody wrote: records, options, probe files and command lines, by the thousand (`make fuzz`)."""
