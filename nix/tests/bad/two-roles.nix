# role: worker
# expect: The option `mvm.role' has conflicting definitions.
# expect: roles/gateway.nix: "gateway"
{
  imports = [ ../../roles/gateway.nix ];
}
