# The system and nothing else: what a program of one's own needs that brings everything along.
{ lib, ... }:
{
  # Programs that were built for other systems find no loader here, and so need no message about that.
  environment.stub-ld.enable = lib.mkDefault false;
  programs.less.lessopen = lib.mkDefault null;
  programs.bash.completion.enable = lib.mkDefault false;
}
