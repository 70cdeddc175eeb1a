# A module system: imports, typed options, definitions with conditions and priorities, submodules, assertions.
#
# It follows nixpkgs in what mvm's modules use, and refuses by name: a definition without an option, a value of another
# type, definitions that conflict, an option without a value, an argument that nobody gives.
{ lib }:
let
  inherit (builtins)
    all
    attrNames
    concatLists
    concatMap
    concatStringsSep
    elem
    filter
    foldl'
    functionArgs
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isPath
    isString
    length
    mapAttrs
    match
    tail
    toJSON
    ;
  inherit (lib) last optional unique;

  isType = type: value: isAttrs value && value._type or null == type;
  isDerivation = value: isAttrs value && value.type or null == "derivation";

  showOption = loc: concatStringsSep "." (map (name: if match "[A-Za-z_][A-Za-z0-9_'-]*|\\[]|<result>" name != null then name else "\"${name}\"") loc);

  # A value for people; some cannot be shown.
  show =
    value:
    if isFunction value then
      "<function>"
    else if isDerivation value then
      "<package ${value.name or "?"}>"
    else if isPath value then
      toString value
    else if isType "if" value || isType "merge" value || isType "override" value then
      "<${value._type}>"
    else if isAttrs value then
      "{ ${toString (map (name: "${name} = ${show value.${name}};") (attrNames value))} }"
    else if isList value then
      "[ ${toString (map show value)} ]"
    else
      toJSON value;
  showDefinitions = defs: concatStringsSep "" (map (def: "\n  in ${def.file}: ${show def.value}") defs);

  # What modules say about their definitions.
  mkIf = condition: content: { _type = "if"; inherit condition content; };
  mkMerge = contents: { _type = "merge"; inherit contents; };
  mkOverride = priority: content: { _type = "override"; inherit priority content; };
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  mkOption = declaration: declaration // { _type = "option"; };
  mkEnableOption = what: mkOption {
    type = types.bool;
    default = false;
    description = "Whether to enable ${what}.";
  };
  literalExpression = text: { _type = "literalExpression"; inherit text; };

  # Moves conditions and priorities of a set into its attributes, without looking at a condition.
  pushDown =
    value:
    if isType "merge" value then
      concatMap pushDown value.contents
    else if isType "if" value then
      map (mapAttrs (_: mkIf value.condition)) (pushDown value.content)
    else if isType "override" value then
      map (mapAttrs (_: mkOverride value.priority)) (pushDown value.content)
    else
      [ value ];

  # The definitions that count, without conditions and priorities.
  discharge =
    loc: defs:
    let
      open =
        def:
        let
          inherit (def) value;
        in
        if isType "merge" value then
          concatMap (content: open (def // { value = content; })) value.contents
        else if isType "if" value then
          if !isBool value.condition then
            throw "The condition of a mkIf for the option `${showOption loc}' is not a boolean. Definition in ${def.file}"
          else if value.condition then
            open (def // { value = value.content; })
          else
            [ ]
        else if isType "override" value then
          map (inner: inner // { inherit (value) priority; }) (open (def // { value = value.content; }))
        else
          [ ({ priority = 100; } // def) ];
      opened = concatMap open defs;
      highest = foldl' (lowest: def: if def.priority < lowest then def.priority else lowest) 10000 opened;
    in
    filter (def: def.priority == highest) opened;

  # One option or element: its definitions, checked and merged.
  mergeDefinitions =
    loc: type: defs:
    let
      counting = discharge loc defs;
      wrong = filter (def: !(type.check def.value)) counting;
    in
    {
      isDefined = counting != [ ];
      value =
        if wrong != [ ] then
          throw "A definition for the option `${showOption loc}' is not of type `${type.description}'.${showDefinitions wrong}"
        else
          type.merge loc counting;
    };

  mergeEqual =
    loc: defs:
    if all (def: def.value == (head defs).value) (tail defs) then
      (head defs).value
    else
      throw "The option `${showOption loc}' has conflicting definitions.${showDefinitions defs}";
  mergeOne =
    loc: defs:
    if length defs == 1 then
      (head defs).value
    else
      throw "The option `${showOption loc}' is defined several times, and can be defined once.${showDefinitions defs}";

  mkType = description: check: merge: { _type = "option-type"; inherit description check merge; };
  scalar = description: check: mkType description check mergeEqual;

  # Each attribute merged by itself; those of which no definition counts are left out.
  mergeAttributes =
    element: loc: defs:
    let
      names = unique (concatMap (def: attrNames def.value) defs);
      merged = name: mergeDefinitions (loc ++ [ name ]) element (concatMap (def: optional (def.value ? ${name}) { inherit (def) file; value = def.value.${name}; }) defs);
      results = builtins.listToAttrs (map (name: { inherit name; value = merged name; }) names);
    in
    mapAttrs (_: result: result.value) (removeAttrs results (filter (name: !results.${name}.isDefined) names));

  types = rec {
    bool = scalar "boolean" isBool;
    int = scalar "signed integer" isInt;
    ints = {
      unsigned = scalar "unsigned integer" (value: isInt value && value >= 0);
      positive = scalar "positive integer" (value: isInt value && value > 0);
      between = low: high: scalar "integer between ${toString low} and ${toString high}" (value: isInt value && value >= low && value <= high);
    };
    port = scalar "16 bit unsigned integer" (value: isInt value && value >= 0 && value <= 65535);
    str = scalar "string" isString;
    strMatching = pattern: scalar "string matching the pattern ${pattern}" (value: isString value && match pattern value != null);
    lines = mkType "strings concatenated with \"\\n\"" isString (_: defs: concatStringsSep "\n" (map (def: def.value) defs));
    enum = values: scalar "one of ${toString (map show values)}" (value: elem value values);
    path = scalar "path" (value: isPath value || isDerivation value || (isString value && match "/.*" value != null));
    package = scalar "package" isDerivation;
    # Whatever it is, once.
    raw = mkType "raw value" (_: true) mergeOne;
    anything = mkType "anything" (_: true) (
      loc: defs:
      if all (def: isAttrs def.value && !isDerivation def.value) defs then
        mergeAttributes anything loc defs
      else if all (def: isList def.value) defs then
        concatMap (def: def.value) defs
      else
        mergeEqual loc defs
    );
    nullOr =
      element:
      mkType "null or ${element.description}" (value: value == null || element.check value) (
        loc: defs: if all (def: def.value != null) defs then element.merge loc defs else mergeEqual loc defs
      );
    listOf =
      element:
      mkType "list of ${element.description}" isList (
        loc: defs:
        let
          elements = concatMap (def: map (value: { inherit (def) file; inherit value; }) def.value) defs;
          merged = map (def: mergeDefinitions (loc ++ [ "[]" ]) element [ def ]) elements;
        in
        map (result: result.value) (filter (result: result.isDefined) merged)
      );
    attrsOf =
      element: mkType "attribute set of ${element.description}" (value: isAttrs value && !isDerivation value) (mergeAttributes element);
    either =
      first: second:
      mkType "${first.description} or ${second.description}" (value: first.check value || second.check value) (
        loc: defs: if all (def: first.check def.value) defs then first.merge loc defs else second.merge loc defs
      );
    functionTo =
      result:
      mkType "function to ${result.description}" isFunction (
        loc: defs: argument:
        (mergeDefinitions (loc ++ [ "<result>" ]) result (map (def: def // { value = def.value argument; }) defs)).value
      );
    submodule =
      module:
      mkType "submodule" (value: isAttrs value || isFunction value) (
        loc: defs:
        verifyDefinitions (evalModules {
          prefix = loc;
          modules = [ module ] ++ map (def: { _file = def.file; config = def.value; }) defs;
          specialArgs.name = last loc;
        })
      );
  };

  # Calls a module that is a function, with the arguments that it names.
  call =
    file: arguments: function:
    let
      wanted = functionArgs function;
      missing = filter (name: !wanted.${name} && !(arguments ? ${name})) (attrNames wanted);
    in
    if missing == [ ] then function arguments else throw "The module ${file} asks for `${toString missing}', which nobody gives";

  # Brings a module into one form: { file, imports, options, config }.
  load =
    arguments: origin: module:
    let
      named = if isPath module || isString module then toString module else origin;
      loaded = if isPath module || isString module then import module else module;
      body = if isFunction loaded then call named arguments loaded else loaded;
      file = body._file or named;
      structure = [
        "_file"
        "imports"
        "options"
        "config"
      ];
      stray = attrNames (removeAttrs body structure);
    in
    {
      inherit file;
      imports = body.imports or [ ];
      options = body.options or { };
      config =
        if !(body ? options || body ? config) then
          removeAttrs body [
            "_file"
            "imports"
          ]
        else if stray == [ ] then
          body.config or { }
        else
          throw "The module ${file} has options or config, and beside them `${toString stray}'";
    };

  # A module and its imports, each file once.
  collect =
    arguments: modules:
    let
      visit =
        origin: found: module:
        let
          key = if isPath module || isString module then toString module else null;
          loaded = load arguments origin module;
          within = foldl' (visit loaded.file) (found // { seen = found.seen // (if key == null then { } else { ${key} = true; }); }) loaded.imports;
        in
        if key != null && found.seen ? ${key} then found else within // { list = within.list ++ [ loaded ]; };
    in
    (foldl' (visit "<unnamed module>") { seen = { }; list = [ ]; } modules).list;

  # The declarations as a tree: sets, and at its ends { option, file }.
  declare =
    loc: declarations:
    let
      names = unique (concatMap (d: attrNames d.options) declarations);
      at =
        name:
        let
          here = concatMap (d: optional (d.options ? ${name}) { inherit (d) file; options = d.options.${name}; }) declarations;
          leaves = filter (d: isType "option" d.options) here;
        in
        if leaves == [ ] then
          declare (loc ++ [ name ]) here
        else if length here == 1 then
          { leaf = true; inherit (head here) file; option = (head here).options; }
        else
          throw "The option `${showOption (loc ++ [ name ])}' is declared in ${concatStringsSep " and " (map (d: d.file) here)}";
    in
    { leaf = false; children = builtins.listToAttrs (map (name: { inherit name; value = at name; }) names); };

  # The values of a tree of declarations, and the definitions that have none.
  evaluate =
    loc: node: defs:
    if node.leaf then
      let
        inherit (node) option file;
        type = option.type or (throw "The option `${showOption loc}' has no type; it is declared in ${file}");
        fallback = optional (option ? default) { inherit file; value = mkOverride 1500 option.default; };
        merged = mergeDefinitions loc type (defs ++ fallback);
        value = if merged.isDefined then merged.value else throw "The option `${showOption loc}' is used, and nobody defines it";
      in
      {
        value = (option.apply or (v: v)) value;
        isDefined = merged.isDefined;
        strays = [ ];
      }
    else
      let
        pushed = concatMap (def: map (value: { inherit (def) file; inherit value; }) (pushDown def.value)) defs;
        of = name: concatMap (def: optional (def.value ? ${name}) { inherit (def) file; value = def.value.${name}; }) pushed;
        children = mapAttrs (name: child: evaluate (loc ++ [ name ]) child (of name)) node.children;
        strays = concatMap (
          def:
          if isAttrs def.value then
            map (name: { loc = loc ++ [ name ]; inherit (def) file; near = attrNames node.children; }) (attrNames (removeAttrs def.value (attrNames node.children)))
          else
            throw "The option `${showOption loc}' is a set of options, and ${def.file} defines it as ${show def.value}"
        ) pushed;
      in
      {
        value = mapAttrs (_: child: child.value) children;
        isDefined = true;
        strays = strays ++ concatLists (map (child: child.strays) (builtins.attrValues children));
      };

  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? [ ],
    }:
    let
      loaded = collect (specialArgs // { inherit config options; lib = specialArgs.lib or lib; }) modules;
      tree = declare prefix loaded;
      evaluated = evaluate prefix tree (map (module: { inherit (module) file; value = module.config; }) loaded);
      config = evaluated.value;
      options = tree;
    in
    {
      inherit config options;
      inherit (evaluated) strays;
    };

  # The configuration, unless something in it is defined that has no option.
  verifyDefinitions =
    evaluated:
    if evaluated.strays == [ ] then
      evaluated.config
    else
      let
        stray = head evaluated.strays;
      in
      throw "The option `${showOption stray.loc}' does not exist. Definition in ${stray.file}. Beside it there are ${toString stray.near}";

  # The same, with every value evaluated to its end and every assertion held.
  verify =
    evaluated:
    let
      config = verifyDefinitions evaluated;
      failed = filter (assertion: !assertion.assertion) config.assertions;
    in
    if failed != [ ] then
      throw "Failed assertions:${concatStringsSep "" (map (assertion: "\n- ${assertion.message}") failed)}"
    else
      builtins.deepSeq config config;
in
{
  inherit types evalModules verify;
  forModules = {
    inherit
      mkIf
      mkMerge
      mkOverride
      mkDefault
      mkForce
      mkOption
      mkEnableOption
      literalExpression
      isDerivation
      ;
  };
}
