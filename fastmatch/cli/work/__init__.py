"""The work of commands. It needs torch, so these modules are imported once the options are checked."""
