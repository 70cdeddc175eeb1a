# Guests that boot, as NixOS tests: built and run only where Nix has the feature `kvm`.
#
# The machine of such a test has a root of its own, so what is tested is everything behind it: the agent as a service,
# drives by label, ports, hooks and what each role does. `machine` is a guest of the role with a config drive.
{ pkgs, lib, mvmLib }:
let
  drive =
    label: size: files:
    pkgs.runCommand "drive-${label}.img" { nativeBuildInputs = [ pkgs.e2fsprogs ]; } ''
      mkdir files
      ${lib.concatStringsSep "\n" (
        lib.mapAttrsToList (name: content: "cp ${pkgs.writeText name (builtins.toJSON content)} files/${name}") files
      )}
      mke2fs -q -t ext4 -b 1024 -L ${label} -d files $out ${size}
    '';

  config = role: {
    version = 1;
    identity = {
      tenant = "acme";
      pool = "pool";
      instance = "i-00000001";
      node = "n1";
    };
    inherit role;
    profile = "minimal";
    hostname = "pool-00000001";
    config_version = 1;
    secrets_epoch = 0;
  };

  guest = role: extra: {
    imports = [
      mvmLib.modules.baseline
      mvmLib.modules.profiles.minimal
      mvmLib.modules.roles.${role}
      extra
    ];
    mvm.profile = "minimal";
    virtualisation.memorySize = 512;
    virtualisation.qemu.options =
      [
        "-drive if=virtio,format=raw,readonly=on,file=${
          drive "mvm-config" "512k" {
            "config.json" = config role;
            "gateway.json" = {
              version = 1;
              allow = [
                {
                  protocol = "tcp";
                  port = 443;
                }
              ];
            };
          }
        }"
        "-device virtio-serial-pci,id=mvm,max_ports=8"
      ]
      ++ lib.concatMap (port: [
        "-chardev socket,id=agent${port},path=agent${port}.sock,server=on,wait=off"
        "-device virtserialport,bus=mvm.0,chardev=agent${port},name=mvm.agent.${port}"
      ]) [
        "0"
        "1"
        "2"
        "3"
      ];
  };

  # What holds for every role.
  common = ''
    machine.wait_for_unit("mvm-guest-agent.service")
    machine.succeed("test -f /etc/mvm-config/config.json")
    machine.succeed("test \"$(hostname)\" = pool-00000001")
    # No data drive: the machine is up all the same.
    machine.wait_for_unit("multi-user.target")
    machine.fail("mountpoint -q /data")
    machine.fail("systemctl cat sshd.service")
    for moment in ["drain", "pre-sleep", "post-wake"]:
        machine.succeed(f"/etc/mvm/hooks/{moment}.d/50-systemd")
        machine.succeed(f"systemctl is-active mvm-{moment}.target")
  '';

  test =
    role: extra: script:
    pkgs.testers.runNixOSTest {
      name = "mvm-${role}";
      nodes.machine = guest role extra;
      testScript = common + script;
    };
in
{
  vm-gateway = test "gateway" { } ''
    machine.wait_for_unit("mvm-gateway.service")
    machine.succeed("nft list chain inet mvm_gateway input | grep -q 'tcp dport 443 accept'")
    machine.succeed("test \"$(cat /proc/sys/net/ipv4/ip_forward)\" = 1")
    machine.succeed("nft delete table inet mvm_gateway")
    machine.succeed("systemctl start mvm-gateway-health.service")
    machine.succeed("nft list chain inet mvm_gateway input | grep -q 'tcp dport 443 accept'")
  '';

  vm-worker =
    test "worker"
      {
        mvm.worker.drainUnits = [ "work.service" ];
        systemd.services.work = {
          description = "Something to drain";
          wantedBy = [ "multi-user.target" ];
          script = "sleep infinity";
        };
      }
      ''
        machine.succeed("systemctl is-active work.service")
        machine.succeed("/etc/mvm/hooks/drain.d/50-systemd")
        machine.fail("systemctl is-active work.service")
        machine.succeed("test -e /run/mvm/draining")
        machine.succeed("/etc/mvm/hooks/post-wake.d/50-systemd")
        machine.succeed("systemctl is-active work.service")
        machine.fail("test -e /run/mvm/draining")
      '';

  vm-builder = test "builder" { } ''
    machine.succeed("nix store ping")
    machine.fail("systemctl is-active mvm-build.service")
  '';

  vm-capability-imessage = test "capability-imessage" { } ''
    machine.wait_for_unit("mvm-capability-imessage.service")
    machine.succeed("journalctl -u mvm-capability-imessage.service | grep -q 'this is a placeholder'")
    machine.fail("ping -c 1 -W 1 192.0.2.1")
  '';
}
