"""The version of tfbn, following semantic versioning."""

VERSION = "0.1.0"
