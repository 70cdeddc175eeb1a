# role: worker
# expect: A definition for the option `systemd.services.work.after' is not of type `list of string'.
# expect: bad/wrong-type.nix: "network.target"
{
  systemd.services.work.after = "network.target";
}
