// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// portName is the name of the virtio port between guest and host.
const portName = "ccload"

// A frame is a kind, the length of its payload (4 bytes, little endian), the
// CRC-32C of kind, length and payload, and the payload.
type kind byte

const (
	frameStdout kind = 'o'
	frameStderr kind = 'e'
	frameExit   kind = 'x' // payload: one byte, the exit status; the last frame

	frameAlive    kind = 'a' // one byte: the guest is not stuck
	frameSamples  kind = 's' // trace.Samples; see appendSample
	frameLinks    kind = 'l' // trace.LinkSamples
	frameProgress kind = 'p' // 8 bytes each: time elapsed and in all, ns
	frameRun      kind = 'r' // a trace.Run as JSON
)

const (
	headerSize = 1 + 4 + 4
	// Of a day's run that the machine spoiled in each second, the description has some
	// 30 MB.
	maxFrame = 64 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frameWriter frames what is written to it.
type frameWriter struct {
	w    io.Writer
	kind kind
}

func (f frameWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		chunk := p[:min(len(p), maxFrame)]
		b := make([]byte, headerSize, headerSize+len(chunk))
		b[0] = byte(f.kind)
		binary.LittleEndian.PutUint32(b[1:], uint32(len(chunk)))
		binary.LittleEndian.PutUint32(b[5:], checksum(b[:5], chunk))
		if _, err := f.w.Write(append(b, chunk...)); err != nil {
			return written, err
		}
		written += len(chunk)
		p = p[len(chunk):]
	}
	return written, nil
}

func checksum(head, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(head, castagnoli), castagnoli, payload)
}

// readFrame reads the next frame; io.EOF between frames is the end.
func readFrame(r io.Reader) (kind, []byte, error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if err == io.ErrUnexpectedEOF {
			err = errors.New("truncated frame")
		}
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(head[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("frame of %d bytes: not what a guest sends", n)
	}
	payload := make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, errors.New("truncated frame")
	}
	if checksum(head[:5], payload) != binary.LittleEndian.Uint32(head[5:]) {
		return 0, nil, errors.New("frame with a wrong checksum")
	}
	return kind(head[0]), payload, nil
}

// demux passes on what a guest sends until it says that it is done, or ends.
// alive is called for every frame.
func (g *Guest) demux(r io.Reader, stdout, stderr io.Writer, alive func()) (status int, done bool, err error) {
	for {
		k, payload, err := readFrame(r)
		if err == io.EOF {
			return 0, false, nil
		}
		if err != nil {
			return 0, false, err
		}
		alive()
		switch k {
		case frameAlive:
		case frameStdout:
			_, err = stdout.Write(payload)
		case frameStderr:
			_, err = stderr.Write(payload)
		case frameExit:
			if len(payload) != 1 {
				return 0, false, errors.New("exit frame without a status")
			}
			return int(payload[0]), true, nil
		case frameSamples, frameLinks, frameProgress, frameRun:
			if g.results == nil {
				return 0, false, errors.New("results of a run that nobody asked for")
			}
			err = g.results.take(k, payload)
		default:
			err = fmt.Errorf("frame of unknown kind %q", byte(k))
		}
		if err != nil {
			return 0, false, err
		}
	}
}
