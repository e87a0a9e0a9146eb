// What operators.cpp calls, compiled beside it on another core: a first start waits for both.

#include "attention.h"
#include "blocks.h"
#include "layer.h"
#include "products.h"
#include "prompts.h"
