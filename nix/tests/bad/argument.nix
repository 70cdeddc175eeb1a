# role: worker
# expect: bad/argument.nix asks for `unstable', which nobody gives
{ unstable, ... }:
{
  environment.systemPackages = [ unstable.jq ];
}
