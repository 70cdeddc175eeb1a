# The parts of nixpkgs' `lib` that mvm's modules use, written anew and small, with the semantics that the modules rely on.
# `modules.nix` beside this evaluates modules with them.
let
  inherit (builtins)
    attrNames
    attrValues
    concatLists
    concatStringsSep
    elem
    filter
    foldl'
    hasAttr
    isAttrs
    listToAttrs
    map
    mapAttrs
    replaceStrings
    stringLength
    substring
    ;

  lists = rec {
    inherit
      concatLists
      concatStringsSep
      elem
      filter
      foldl'
      map
      ;
    inherit (builtins) all any head tail length concatMap;
    optional = condition: value: if condition then [ value ] else [ ];
    optionals = condition: values: if condition then values else [ ];
    last = list: builtins.elemAt list (builtins.length list - 1);
    unique = foldl' (seen: value: if elem value seen then seen else seen ++ [ value ]) [ ];
  };

  attrsets = rec {
    inherit
      attrNames
      attrValues
      hasAttr
      isAttrs
      listToAttrs
      mapAttrs
      ;
    nameValuePair = name: value: { inherit name value; };
    mapAttrs' = f: set: listToAttrs (map (name: f name set.${name}) (attrNames set));
    mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);
    filterAttrs = keep: set: listToAttrs (concatLists (mapAttrsToList (name: value: lists.optional (keep name value) { inherit name value; }) set));
    genAttrs = names: f: listToAttrs (map (name: { inherit name; value = f name; }) names);
    optionalAttrs = condition: set: if condition then set else { };
  };

  strings = rec {
    inherit replaceStrings;
    optionalString = condition: text: if condition then text else "";
    hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
    hasSuffix =
      suffix: text:
      let
        start = stringLength text - stringLength suffix;
      in
      start >= 0 && substring start (-1) text == suffix;
    removeSuffix = suffix: text: if hasSuffix suffix text then substring 0 (stringLength text - stringLength suffix) text else text;
    escapeShellArg = text: "'${replaceStrings [ "'" ] [ "'\\''" ] (toString text)}'";
    escapeShellArgs = texts: concatStringsSep " " (map escapeShellArg texts);
    concatMapStringsSep = separator: f: values: concatStringsSep separator (map f values);
    makeBinPath = packages: concatStringsSep ":" (map (package: "${package}/bin") packages);
  };

  meta = {
    getExe = package: "${package}/bin/${package.meta.mainProgram or package.pname or package.name}";
    licenses.asl20 = { };
    platforms.linux = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };

  # A source is what exists of it; nothing is copied.
  fileset = {
    unions = files: files;
    toSource =
      { root, fileset }:
      let
        missing = filter (file: !builtins.pathExists file) fileset;
      in
      if missing == [ ] then "/nix/store/stub-source-of-${baseNameOf root}" else throw "lib.fileset: ${toString (builtins.head missing)} does not exist";
  };

  modules = import ./modules.nix { lib = lists // attrsets // strings; };
in
lists // attrsets // strings // meta // modules.forModules // { inherit fileset; inherit (modules) types evalModules verify; }
