# A host for the checks: the module with a small fleet, and the little that makes a machine of it.
{ ... }:
{
  imports = [ ../modules/mvm-host.nix ];

  mvm.host = {
    enable = true;
    fleet = {
      schema_version = 1;
      tenants = [
        {
          tenant_id = "demo";
          network = {
            tenant_net_id = 1;
            ipv4_subnet = "10.240.1.0/24";
          };
          pools = [
            {
              pool_id = "gw";
              role = "gateway";
              instance_resources = {
                vcpus = 1;
                mem_mib = 256;
              };
              desired_counts.running = 1;
            }
          ];
        }
      ];
    };
  };

  boot.loader.grub.enable = false;
  fileSystems."/" = {
    device = "/dev/vda";
    fsType = "ext4";
  };
  system.stateVersion = "24.11";
}
