# role: worker
# expect: The option `services.openshh' does not exist. Definition in
# expect: bad/misspelt-option.nix
{
  services.openshh.enable = false;
}
