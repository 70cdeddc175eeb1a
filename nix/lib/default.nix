# Guests as systems, and images as packages; also for users' own flakes (`mvm.lib`).
{ nixpkgs }:
let
  inherit (nixpkgs) lib;

  readManifest = import ./manifest.nix { inherit lib; };

  # Where mvm runs microVMs, or will: images are built for both.
  systems = [
    "x86_64-linux"
    "aarch64-linux"
  ];

  # mvm's own modules, for roles and profiles that build on them: `{ mvm, ... }: { imports = [ mvm.roles.worker ]; }`.
  own = readManifest ../.;
  modules = {
    baseline = ../guests/baseline.nix;
    roles = lib.mapAttrs (_: role: role.module) own.roles;
    profiles = lib.mapAttrs (_: profile: profile.module) own.profiles;
  };

  # One guest as a NixOS system: the baseline, a profile and, unless it is a legacy image, a role.
  #
  #   mkGuest { system = "x86_64-linux"; profile = "minimal"; profileModules = [ ./p.nix ];
  #             role = "worker"; roleModules = [ ./r.nix ]; services = [ ]; ports = null; modules = [ ]; }
  #
  # Its image is `config.system.build.mvmImage`.
  mkGuest =
    {
      system,
      profile,
      profileModules,
      role ? null,
      roleModules ? [ ],
      services ? [ ],
      ports ? null,
      modules ? [ ],
    }:
    nixpkgs.lib.nixosSystem {
      inherit system;
      specialArgs.mvm = ownModules;
      modules =
        [
          ownModules.baseline
          {
            _file = "the manifest's ${if role == null then "" else "role ${role} and "}profile ${profile}";
            mvm = { inherit role profile services ports; };
          }
        ]
        ++ profileModules
        ++ roleModules
        ++ modules;
    };
  ownModules = modules;

  # Every role with every profile, and every profile alone (`role` is null then: the legacy images).
  combinations =
    manifest:
    let
      profiles = lib.attrNames manifest.profiles;
      roles = [ null ] ++ lib.attrNames manifest.roles;
    in
    lib.concatMap (role: map (profile: { inherit role profile; }) profiles) roles;

  attribute = { role, profile }: if role == null then "tenant-${profile}" else "tenant-${role}-${profile}";

  # All guests of a flake that has a manifest at `src`, by the name of their package.
  mkGuests =
    {
      src,
      system,
      modules ? [ ],
    }:
    let
      manifest = readManifest src;
      guest =
        { role, profile }:
        mkGuest {
          inherit system role profile modules;
          profileModules = [ manifest.profiles.${profile}.module ];
          roleModules = lib.optional (role != null) manifest.roles.${role}.module;
          services = if role == null then [ ] else manifest.roles.${role}.services or [ ];
          ports = if role == null then null else manifest.roles.${role}.ports or null;
        };
    in
    builtins.listToAttrs (
      map (c: {
        name = attribute c;
        value = guest c;
      }) (combinations manifest)
    );

  # `packages` of a flake with a manifest: { <system>.tenant-<role>-<profile> = image; }.
  mkImages =
    {
      src,
      systems ? allSystems,
      modules ? [ ],
    }:
    lib.genAttrs systems (
      system: lib.mapAttrs (_: guest: guest.config.system.build.mvmImage) (mkGuests { inherit src system modules; })
    );
  allSystems = systems;

  # `checks` of a flake with a manifest: each guest is evaluated whole, and nothing of it is built.
  mkChecks =
    {
      src,
      systems ? allSystems,
      modules ? [ ],
    }:
    lib.genAttrs systems (
      system:
      lib.mapAttrs' (name: guest: {
        name = "evaluates-${name}";
        value = evaluates system name guest;
      }) (mkGuests { inherit src system modules; })
    );
  evaluates =
    system: name: guest:
    nixpkgs.legacyPackages.${system}.writeText "evaluates-${name}" (
      # Without its context the path is a text: the guest is instantiated and not built.
      builtins.unsafeDiscardStringContext guest.config.system.build.mvmImage.drvPath
    );
in
{
  inherit
    systems
    readManifest
    mkGuest
    mkGuests
    mkImages
    mkChecks
    modules
    ;
}
