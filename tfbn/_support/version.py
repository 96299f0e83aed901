"""The version of tfbn, following semantic versioning."""

VERSION = "0.2.0"
