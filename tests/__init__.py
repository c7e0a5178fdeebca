"""Makes this folder the package `tests`: some installed distributions bring a package of that name."""
