# What `tests/nix.rs` evaluates with the stub of nixpkgs, each part by its name:
#
#   nix-instantiate --eval --strict --json nix/tests/eval.nix -A packages
let
  nixpkgs = import ./stub;
  inherit (nixpkgs) lib;

  # The flake's own function, with inputs that are stubs.
  outputsOf = directory: inputs: (import (directory + "/flake.nix")).outputs ({ self = { outPath = toString directory; }; } // inputs);
  mvm = outputsOf ../. { inherit nixpkgs; };
  template = outputsOf ../template { inherit mvm; };

  systemOf = modules: (nixpkgs.lib.nixosSystem { system = "x86_64-linux"; inherit modules; }).config;
  guestOf =
    role: modules:
    (mvm.lib.mkGuest {
      system = "x86_64-linux";
      profile = "minimal";
      profileModules = [ mvm.lib.modules.profiles.minimal ];
      inherit role modules;
      roleModules = if role == null then [ ] else [ mvm.lib.modules.roles.${role} ];
    }).config;

  # Each package evaluated whole: its kernel arguments, or its name.
  evaluated = lib.mapAttrs (_: lib.mapAttrs (_: package: builtins.deepSeq package (package.vmm or package.name)));
  host = systemOf [ ./host.nix ];
in
{
  packages = evaluated mvm.packages;
  checks = evaluated mvm.checks;
  modules = lib.mapAttrs (_: toString) mvm.nixosModules;
  shells = evaluated mvm.devShells;
  template = {
    packages = evaluated template.packages;
    checks = evaluated template.checks;
    path = toString mvm.templates.default.path;
  };
  # The command lines that the host's units start.
  commands = lib.mapAttrsToList (_: service: service.serviceConfig.ExecStart) host.systemd.services;

  # What the host's units may do.
  restrictions = lib.mapAttrs (
    _: service: removeAttrs service.serviceConfig [ "ExecStart" ] // { path = map (package: package.name) service.path; }
  ) host.systemd.services;

  # What declarations come to in a guest that makes use of everything.
  guest =
    let
      config = guestOf "worker" [
        {
          mvm.services = [
            {
              unit = "sync.service";
              secrets = [ "token" ];
            }
          ];
          systemd.services.sync.script = "sleep infinity";
          mvm.worker.drainUnits = [ "sync.service" ];
          mvm.hooks.preSleep.flush = "sync";
          mvm.drives.models.fsType = "erofs";
          mvm.image.format = "erofs";
          mvm.memoryMiB.sync = 100;
        }
      ];
      inherit (config.systemd) services targets;
    in
    {
      agent = services.mvm-guest-agent.serviceConfig.Type;
      secrets = services.sync.unitConfig.ConditionPathExists;
      started = targets.multi-user.wants;
      targets = builtins.filter (lib.hasPrefix "mvm-") (builtins.attrNames targets);
      hooks = builtins.filter (lib.hasPrefix "mvm/hooks/") (builtins.attrNames config.environment.etc);
      moments = lib.mapAttrs (_: service: service.wantedBy) (lib.filterAttrs (name: _: builtins.match "mvm-(drain|pre-sleep|post-wake)-.*" name != null) services);
      drain = services.mvm-drain-worker.script;
      drive = removeAttrs (builtins.head config.systemd.mounts) [ "description" ];
      root = config.fileSystems."/nix/store";
      inherit (config.system.build.mvmImage) vmm;
    };

  # What must fail: a module in a guest of a role, or on a host; a manifest.
  bad =
    { role, module }:
    let
      modules = [ module ];
      config = if role == "host" then systemOf ([ ./host.nix ] ++ modules) else guestOf role modules;
    in
    builtins.deepSeq config.system.build.mvmImage or config.system.build.toplevel "nothing wrong was found";
  badManifest =
    { directory }:
    builtins.deepSeq (mvm.lib.readManifest directory) "nothing wrong was found";
}
