"""The messages of a Core ML model file, as far as an ML program needs them. Torch-free.

Importing coremltools for its own takes 6 s and loads torch. The numbers below are those of Apple's
`Model.proto`, `MIL.proto` and `FeatureTypes.proto`, which never change for a field; fields that are
not listed are skipped.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# A line: message, then its fields as `number name type`; `name*` is repeated, `name@` a map from
# string to the type.
_SCHEMA = """
Model: 1 specificationVersion int32; 2 description ModelDescription; 502 mlProgram Program
ModelDescription: 20 functions* FunctionDescription; 21 defaultFunctionName string; \
1 input* Feature; 10 output* Feature; 13 state* Feature
FunctionDescription: 1 name string; 2 input* Feature; 3 output* Feature; 6 state* Feature
Feature: 1 name string; 3 type FeatureType
FeatureType: 5 multiArrayType ArrayType; 8 stateType StateFeature; 1000 isOptional bool
StateFeature: 1 arrayType ArrayType
ArrayType: 1 shape* int64; 2 dataType int32; 21 enumeratedShapes Shapes; 31 shapeRange ShapeRange
Shapes: 1 shapes* Shape
Shape: 1 shape* int64
ShapeRange: 1 sizeRanges* SizeRange
SizeRange: 1 lowerBound uint64; 2 upperBound int64
Program: 1 version int64; 2 functions@ Function
Function: 1 inputs* Named; 2 opset string; 3 block_specializations@ Block
Block: 1 inputs* Named; 2 outputs* string; 3 operations* Operation
Operation: 1 type string; 2 inputs@ Argument; 3 outputs* Named; 4 blocks* Block; 5 attributes@ Value
Argument: 1 arguments* Binding
Binding: 1 name string; 2 value Value
Named: 1 name string; 2 type ValueType
ValueType: 1 tensorType TensorType; 2 listType Other; 3 tupleType Other; 4 dictionaryType Other; \
5 stateType StateType
StateType: 1 wrappedType ValueType
TensorType: 1 dataType int32; 2 rank int64; 3 dimensions* Dimension
Dimension: 1 constant Constant; 2 unknown Other
Constant: 1 size uint64
Other:
Value: 2 type ValueType; 3 immediateValue Immediate; 5 blobFileValue Blob
Immediate: 1 tensor Tensor; 2 tuple Other; 3 list Other; 4 dictionary Other
Blob: 1 fileName string; 2 offset uint64
Tensor: 1 floats Floats; 2 ints Ints; 3 bools Bools; 4 strings Strings; 5 longInts Longs; \
6 doubles Doubles; 7 bytes Bytes
Floats: 1 values* float
Doubles: 1 values* double
Ints: 1 values* int32
Longs: 1 values* int64
Bools: 1 values* bool
Strings: 1 values* string
Bytes: 1 values bytes
"""

_PACKAGE = "pocketglm.coreml"
_FIELD = descriptor_pb2.FieldDescriptorProto


def _add_field(message: Any, text: str) -> None:
    number, name, kind = text.split()
    field = message.field.add(name=name.rstrip("*@"), number=int(number))
    field.label = _FIELD.LABEL_REPEATED if name[-1] in "*@" else _FIELD.LABEL_OPTIONAL
    if name.endswith("@"):
        entry = message.nested_type.add(name=field.name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "1 key string")
        _add_field(entry, f"2 value {kind}")
        kind = f"{message.name}.{entry.name}"
    if kind[0].isupper():
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        field.type = getattr(_FIELD, f"TYPE_{kind.upper()}")


@functools.cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="pocketglm/coreml.proto", package=_PACKAGE, syntax="proto3"
    )
    for line in _SCHEMA.strip().splitlines():
        name, _, fields = line.partition(":")
        message = file.message_type.add(name=name)
        for field in filter(None, map(str.strip, fields.split(";"))):
            _add_field(message, field)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))


def parse_model(data: bytes) -> Any:
    """The `Model` message of a `.mlmodel` file.

    Raises:
        google.protobuf.message.DecodeError: these are not the bytes of one.
    """
    return _model_class().FromString(data)
