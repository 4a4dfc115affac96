"""Every figure and table of a study, for a paper, by the scripts of this folder: `python -m figures --study DIR`."""

from figures.making import run, scripts

if __name__ == "__main__":
    run(scripts(), __doc__)
