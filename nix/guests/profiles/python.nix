# Python, with the libraries that the image wants.
{ config, lib, pkgs, ... }:
let
  cfg = config.mvm.python;
in
{
  options.mvm.python = {
    package = lib.mkOption {
      type = lib.types.package;
      default = pkgs.python3;
      defaultText = lib.literalExpression "pkgs.python3";
      description = "The interpreter.";
    };
    packages = lib.mkOption {
      type = lib.types.functionTo (lib.types.listOf lib.types.package);
      default = _: [ ];
      defaultText = lib.literalExpression "python: [ ]";
      example = lib.literalExpression "python: [ python.requests ]";
      description = "Libraries, out of the interpreter's set; those of several modules add up.";
    };
  };

  config = {
    environment.systemPackages = [ (cfg.package.withPackages cfg.packages) ];
    mvm.memoryMiB.python = lib.mkDefault 64;
  };
}
