// What a request asks for, in the words of an audit record: whom it is about,
// and everything else that it says, whether or not it will be granted. Made from
// the message's own description, so that it knows requests that come later.

package api

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/internal/audit"
)

// maxDescription bounds the description, in bytes: a record is cut there anyway.
const maxDescription = 4 << 10

// subjectOfRequest is whom a request names: in fields of its own, or of the
// entry in it.
func subjectOfRequest(m proto.Message) (r audit.Record) {
	name := func(of protoreflect.Message) {
		for field, text := range map[protoreflect.Name]*string{
			"spiffe_id": &r.SPIFFEID, "agent_id": &r.SPIFFEID, "entry_id": &r.EntryID,
			"authority_id": &r.AuthorityID, "serial": &r.Serial, "note": &r.Reason,
		} {
			fd := of.Descriptor().Fields().ByName(field)
			if fd != nil && fd.Kind() == protoreflect.StringKind && !fd.IsList() && of.Has(fd) {
				*text = of.Get(fd).String()
			}
		}
	}
	top := m.ProtoReflect()
	if fd := top.Descriptor().Fields().ByName("entry"); fd != nil && fd.Message() != nil && !fd.IsList() {
		name(top.Get(fd).Message())
	}
	name(top)
	return r
}

// describe is what a request says beside whom it is about: ` (name: "b")`, or
// nothing. Strings are quoted, because anything can stand in them; bytes are left
// out.
func describe(m proto.Message) string {
	var b strings.Builder
	describeMessage(&b, m.ProtoReflect(), inItsOwnField)
	if b.Len() == 0 {
		return ""
	}
	return " (" + b.String() + ")"
}

// describeWhole is everything that a request says; whole: it fits.
func describeWhole(m proto.Message) (text string, whole bool) {
	var b strings.Builder
	describeMessage(&b, m.ProtoReflect(), nil)
	return b.String(), b.Len() <= maxDescription
}

// inItsOwnField are those that the record has elsewhere.
var inItsOwnField = map[protoreflect.Name]bool{
	"spiffe_id": true, "agent_id": true, "entry_id": true, "authority_id": true, "serial": true, "note": true,
}

// describeMessage leaves out the fields in elsewhere.
func describeMessage(b *strings.Builder, m protoreflect.Message, elsewhere map[protoreflect.Name]bool) {
	fields := m.Descriptor().Fields()
	first := true
	for i := range fields.Len() {
		fd := fields.Get(i)
		if !m.Has(fd) || fd.Kind() == protoreflect.BytesKind || fd.IsMap() || elsewhere[fd.Name()] || b.Len() > maxDescription {
			continue
		}
		if !first {
			b.WriteString(", ")
		}
		first = false
		b.WriteString(string(fd.Name()) + ": ")
		if !fd.IsList() {
			describeValue(b, fd, m.Get(fd), elsewhere)
			continue
		}
		list := m.Get(fd).List()
		for j := range list.Len() {
			if j > 0 {
				b.WriteByte(' ')
			}
			if b.Len() > maxDescription {
				break
			}
			describeValue(b, fd, list.Get(j), elsewhere)
		}
	}
}

func describeValue(b *strings.Builder, fd protoreflect.FieldDescriptor, v protoreflect.Value, elsewhere map[protoreflect.Name]bool) {
	switch fd.Kind() {
	case protoreflect.MessageKind, protoreflect.GroupKind:
		if t, ok := v.Message().Interface().(*timestamppb.Timestamp); ok {
			b.WriteString(t.AsTime().Format(time.RFC3339))
			return
		}
		b.WriteByte('(')
		describeMessage(b, v.Message(), elsewhere)
		b.WriteByte(')')
	case protoreflect.StringKind:
		s := v.String()
		fmt.Fprintf(b, "%q", s[:min(len(s), maxDescription)])
	case protoreflect.EnumKind:
		if value := fd.Enum().Values().ByNumber(v.Enum()); value != nil {
			b.WriteString(string(value.Name()))
			return
		}
		fmt.Fprint(b, v.Enum())
	default:
		fmt.Fprint(b, v.Interface())
	}
}
