# role: worker
# expect: The option `systemd.services.work.serviceConf' does not exist. Definition in
# expect: bad/misspelt-in-submodule.nix
{
  systemd.services.work.serviceConf.Type = "oneshot";
}
