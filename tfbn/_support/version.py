"""The version of tfbn, as semantic versioning has it."""

VERSION = "0.1.0"
