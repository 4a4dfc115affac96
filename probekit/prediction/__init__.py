"""From a trace to rounds, from rounds and costs to a choice, and from the choice to its proof."""
