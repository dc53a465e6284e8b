"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # how long an example takes decides no test
settings.load_profile("any machine")
