# A profile of this flake: which parts make up the image.
{
  name = "plain";
  parts = ./parts;
}
