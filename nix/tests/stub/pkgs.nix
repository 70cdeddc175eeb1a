# Packages that are names: enough to evaluate with, nothing to build.
{ lib, nixosSystem }:
system:
let
  # A package has no more than what mvm's modules read of one.
  package = name: extra: {
    type = "derivation";
    inherit name;
    pname = name;
    outPath = "/nix/store/stub-${name}";
    drvPath = "/nix/store/stub-${name}.drv";
    meta.mainProgram = name;
  } // extra;

  callWith =
    scope: file: arguments:
    let
      function = import file;
      wanted = builtins.functionArgs function;
      missing = builtins.filter (name: !wanted.${name} && !((scope // arguments) ? ${name})) (builtins.attrNames wanted);
    in
    if missing == [ ] then
      function (builtins.intersectAttrs wanted scope // arguments)
    else
      throw "callPackage ${toString file}: there is no package ${toString missing}";

  names = [
    "binutils-unwrapped"
    "cargo"
    "cargo-nextest"
    "clippy"
    "coreutils"
    "e2fsprogs"
    "erofs-utils"
    "gitMinimal"
    "gnutar"
    "iproute2"
    "jq"
    "makeWrapper"
    "nftables"
    "nix"
    "procps"
    "qemu"
    "rustc"
    "rustfmt"
    "squashfsTools"
    "systemd"
    "util-linux"
  ];

  # Texts are evaluated with what holds them.
  text = name: content: package name { text = builtins.seq (builtins.stringLength content) content; };

  pkgs = lib.genAttrs names (name: package name { }) // {
    inherit lib system;
    stdenv.hostPlatform = {
      inherit system;
      isx86_64 = system == "x86_64-linux";
    };
    python3 = package "python3" { withPackages = choose: package "python3-env" { libraries = choose { requests = package "requests" { }; }; }; };
    rustPlatform.buildRustPackage =
      arguments:
      if builtins.pathExists arguments.cargoLock.lockFile then
        package arguments.pname { inherit (arguments) src version; }
      else
        throw "${arguments.pname}: there is no ${toString arguments.cargoLock.lockFile}";
    callPackage = callWith pkgs;
    pkgsStatic.callPackage = callWith pkgs;
    runCommand = name: attributes: script: text name script // (attributes.passthru or { }) // { inherit attributes; };
    writeText = text;
    writeShellScript = text;
    writeShellApplication = { name, runtimeInputs, text }: package name { inherit text runtimeInputs; };
    closureInfo = { rootPaths }: package "closure-info" { roots = map (path: "${path}") rootPaths; };
    linkFarm = name: links: package name { links = lib.mapAttrs (_: target: "${target}") links; };
    mkShell = { packages }: package "shell" { inputs = map (path: "${path}") packages; };
    formats.toml = _: {
      type = lib.types.attrsOf lib.types.anything;
      generate = name: value: text name (builtins.toJSON value);
    };
    linuxPackages.kernel = package "linux" { dev = package "linux-dev" { }; };
    # The machines of a test are systems, like others.
    testers.runNixOSTest =
      {
        name,
        nodes,
        testScript,
      }:
      text "vm-test-${name}" testScript
      // {
        nodes = lib.mapAttrs (_: module: (nixosSystem { inherit system; modules = [ module ]; }).config) nodes;
      };
  };
in
pkgs
