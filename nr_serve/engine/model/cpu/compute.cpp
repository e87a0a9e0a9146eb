// The operators that operators.cpp registers; a file of its own, so that both compile at once: a first start
// waits.

#include "attention.h"
#include "blocks.h"
#include "layer.h"
#include "likeliest.h"
#include "paired_blocks.h"
#include "products.h"
#include "prompts.h"
