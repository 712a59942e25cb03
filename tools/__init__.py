"""Tools of this repository; none is part of the installed package."""
