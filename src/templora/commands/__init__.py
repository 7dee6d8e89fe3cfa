"""The commands of `templora`, one a module; each is parse, build, loop over events, show."""
