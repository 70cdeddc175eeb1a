# role: worker
# expect: mvm: role worker, profile minimal: services.openssh.enable is set, and guests have no SSH
{
  services.openssh.enable = true;
}
