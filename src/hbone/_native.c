/* What the data path calls for each read and write, without the cost of a Python call: sockets, and OpenSSL.

   Optional. `hbone/openssl.py` has the same functions in Python, which every test runs on as well; `tools/compiled.py`
   builds this one into the compiled wheel. It links against no OpenSSL: `use` is given the addresses of the functions
   in the one that pyOpenSSL holds, so both see the same connections. Pointers come as numbers; who passes one keeps
   what it points to alive.

   Nothing here blocks but `poll`, so the interpreter's lock is kept. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <limits.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define RECORD 16384      /* payload of a TLS record at most. RFC 8446 5.1 */
#define ADDRESSES 10      /* of functions of OpenSSL's */
#define EVENTS 256        /* of one `poll` at most */
#define SSL_WANT_READ 2   /* what SSL_get_error says: values of OpenSSL's interface, the same in all versions */
#define SSL_ZERO_RETURN 6

/* --- sockets */

static PyCFunction socket_fileno;
static PyObject *slow_recv_into, *slow_send;

static int descriptor(PyObject *self) {
    PyObject *number = socket_fileno(self, NULL);
    if (number == NULL)
        return -1;
    long fd = PyLong_AsLong(number);
    Py_DECREF(number);
    return (int)fd; /* of a closed socket -1, which the kernel refuses */
}

/* Whether the last argument says that the call must not wait; only then is it made here. */
static int does_not_wait(PyObject *flags, int *value) {
    long number = PyLong_Check(flags) ? PyLong_AsLong(flags) : 0;
    if (number == -1 && PyErr_Occurred())
        PyErr_Clear(); /* the slow way says what is wrong */
    *value = (int)number;
    return number > 0 && number <= INT_MAX && (number & MSG_DONTWAIT);
}

static PyObject *otherwise(PyObject *method, PyObject *self, PyObject *const *args, Py_ssize_t count) {
    PyObject *all[4] = {self};
    if (count > 3) {
        PyErr_SetString(PyExc_TypeError, "at most three arguments");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        all[i + 1] = args[i];
    return PyObject_Vectorcall(method, all, (size_t)count + 1, NULL);
}

PyDoc_STRVAR(recv_into_doc, "recv_into(buffer, nbytes=0, flags=0, /)\n--\n\nAs that of a socket.");

static PyObject *fast_recv_into(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int flags;
    if (count != 3 || !does_not_wait(args[2], &flags))
        return otherwise(slow_recv_into, self, args, count);
    Py_ssize_t limit = PyNumber_AsSsize_t(args[1], PyExc_OverflowError);
    if (limit == -1 && PyErr_Occurred())
        return NULL;
    Py_buffer buffer;
    if (PyObject_GetBuffer(args[0], &buffer, PyBUF_WRITABLE) < 0)
        return NULL;
    if (limit < 0 || limit > buffer.len) {
        PyBuffer_Release(&buffer);
        PyErr_SetString(PyExc_ValueError, "nbytes is negative, or more than the buffer has");
        return NULL;
    }
    int fd = descriptor(self);
    ssize_t got = -1;
    if (!PyErr_Occurred()) {
        do
            got = recv(fd, buffer.buf, (size_t)(limit ? limit : buffer.len), flags);
        while (got < 0 && errno == EINTR && PyErr_CheckSignals() == 0);
        if (got < 0 && !PyErr_Occurred())
            PyErr_SetFromErrno(PyExc_OSError);
    }
    PyBuffer_Release(&buffer);
    return got < 0 ? NULL : PyLong_FromSsize_t(got);
}

PyDoc_STRVAR(send_doc, "send(data, flags=0, /)\n--\n\nAs that of a socket.");

static PyObject *fast_send(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    int flags;
    if (count != 2 || !does_not_wait(args[1], &flags))
        return otherwise(slow_send, self, args, count);
    Py_buffer data;
    if (PyObject_GetBuffer(args[0], &data, PyBUF_SIMPLE) < 0)
        return NULL;
    int fd = descriptor(self);
    ssize_t sent = -1;
    if (!PyErr_Occurred()) {
        do
            sent = send(fd, data.buf, (size_t)data.len, flags);
        while (sent < 0 && errno == EINTR && PyErr_CheckSignals() == 0);
        if (sent < 0 && !PyErr_Occurred())
            PyErr_SetFromErrno(PyExc_OSError);
    }
    PyBuffer_Release(&data);
    return sent < 0 ? NULL : PyLong_FromSsize_t(sent);
}

static PyMethodDef socket_methods[] = {
    {"recv_into", (PyCFunction)(void (*)(void))fast_recv_into, METH_FASTCALL, recv_into_doc},
    {"send", (PyCFunction)(void (*)(void))fast_send, METH_FASTCALL, send_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot socket_slots[] = {
    {Py_tp_doc, "A socket whose calls that do not wait cost little: `recv_into` and `send` with MSG_DONTWAIT."},
    {Py_tp_methods, socket_methods},
    {0, NULL},
};

static PyType_Spec socket_spec = {
    .name = "hbone._native.Socket",
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = socket_slots,
};

/* --- epoll */

PyDoc_STRVAR(poll_doc, "poll(epoll, timeout, limit, /)\n--\n\n"
                       "Events (descriptor, mask) of an epoll's descriptor. Timeout: -1 waits, 0 does not.");

static PyObject *poll_events(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    struct epoll_event events[EVENTS];
    long value[3];
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "three arguments are wanted");
        return NULL;
    }
    for (int i = 0; i < 3; i++) {
        value[i] = PyLong_AsLong(args[i]);
        if (value[i] == -1 && PyErr_Occurred())
            return NULL;
    }
    int limit = value[2] < 1 ? 1 : value[2] > EVENTS ? EVENTS : (int)value[2], found;
    do {
        Py_BEGIN_ALLOW_THREADS
        found = epoll_wait((int)value[0], events, limit, value[1] < 0 ? -1 : 0);
        Py_END_ALLOW_THREADS
    } while (found < 0 && errno == EINTR && PyErr_CheckSignals() == 0);
    if (found < 0)
        return PyErr_Occurred() ? NULL : PyErr_SetFromErrno(PyExc_OSError);
    PyObject *list = PyList_New(found);
    for (int i = 0; list != NULL && i < found; i++) {
        PyObject *fd = PyLong_FromLong(events[i].data.fd), *mask = PyLong_FromUnsignedLong(events[i].events);
        PyObject *event = fd != NULL && mask != NULL ? PyTuple_New(2) : NULL;
        if (event == NULL) {
            Py_XDECREF(fd);
            Py_XDECREF(mask);
            Py_CLEAR(list);
        } else {
            PyTuple_SET_ITEM(event, 0, fd);
            PyTuple_SET_ITEM(event, 1, mask);
            PyList_SET_ITEM(list, i, event);
        }
    }
    return list;
}

/* --- OpenSSL */

static struct {
    void (*clear_errors)(void);
    int (*ssl_read)(void *, void *, int);
    int (*ssl_write)(void *, const void *, int);
    int (*ssl_get_error)(void *, int);
    int (*bio_read)(void *, void *, int);
    int (*bio_write)(void *, const void *, int);
    long (*bio_get_mem_data)(void *, char **);
    void *(*bio_new_mem_buf)(const void *, int);
    void (*bio_set_mem_eof_return)(void *, int);
    void (*ssl_set_bio)(void *, void *, void *);
} tls;

/* Numbers of a call; false with an exception set. */
static int numbers(PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted, Py_ssize_t *values) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments are wanted, not %zd", wanted, count);
        return 0;
    }
    if (tls.clear_errors == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "use() was not called");
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        values[i] = PyLong_AsSsize_t(args[i]);
        if (values[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

static int bounded(Py_ssize_t nbytes) { return nbytes < 0 ? 0 : nbytes > INT_MAX ? INT_MAX : (int)nbytes; }

PyDoc_STRVAR(use_doc, "use(*addresses, /)\n--\n\nTake OpenSSL's functions, in the order of FUNCTIONS.");

static PyObject *use(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    void *found[ADDRESSES];
    if (count != ADDRESSES) {
        PyErr_Format(PyExc_TypeError, "%d addresses are wanted", ADDRESSES);
        return NULL;
    }
    for (int i = 0; i < ADDRESSES; i++) {
        found[i] = PyLong_AsVoidPtr(args[i]);
        if (found[i] == NULL) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_ValueError, "an address is 0");
            return NULL;
        }
    }
    *(void **)&tls.ssl_read = found[1];
    *(void **)&tls.ssl_write = found[2];
    *(void **)&tls.ssl_get_error = found[3];
    *(void **)&tls.bio_read = found[4];
    *(void **)&tls.bio_write = found[5];
    *(void **)&tls.bio_get_mem_data = found[6];
    *(void **)&tls.bio_new_mem_buf = found[7];
    *(void **)&tls.bio_set_mem_eof_return = found[8];
    *(void **)&tls.ssl_set_bio = found[9];
    *(void **)&tls.clear_errors = found[0];
    Py_RETURN_NONE;
}

PyDoc_STRVAR(read_records_doc, "read_records(ssl, into, where, room, /)\n--\n\nSee hbone.openssl.");

static PyObject *read_records(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t value[4];
    if (!numbers(args, count, 4, value))
        return NULL;
    void *ssl = (void *)value[0], *into = (void *)value[1];
    char *where = (char *)value[2];
    int room = bounded(value[3]), total = 0;
    tls.clear_errors();
    do {
        int got = tls.ssl_read(ssl, where + total, room - total);
        if (got <= 0) {
            int error = total ? tls.ssl_get_error(ssl, got) : 0;
            return PyLong_FromLong(error == SSL_WANT_READ ? total : error == SSL_ZERO_RETURN ? -1 - total : got);
        }
        total += got;
    } while (room - total >= RECORD && tls.bio_get_mem_data(into, NULL) > 0);
    return PyLong_FromLong(total);
}

PyDoc_STRVAR(write_records_doc, "write_records(ssl, where, nbytes, /)\n--\n\nSee hbone.openssl.");

static PyObject *write_records(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t value[3];
    if (!numbers(args, count, 3, value))
        return NULL;
    return PyLong_FromLong(tls.ssl_write((void *)value[0], (void *)value[1], bounded(value[2])));
}

PyDoc_STRVAR(write_small_doc, "write_small(ssl, data, nbytes, /)\n--\n\nSee hbone.openssl.");

static PyObject *write_small(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    PyObject *pair[2] = {count == 3 ? args[0] : NULL, count == 3 ? args[2] : NULL};
    Py_ssize_t value[2];
    if (!numbers(pair, count == 3 ? 2 : count, 2, value))
        return NULL;
    Py_buffer data;
    if (PyObject_GetBuffer(args[1], &data, PyBUF_SIMPLE) < 0)
        return NULL;
    int done = tls.ssl_write((void *)value[0], data.buf, bounded(value[1] < data.len ? value[1] : data.len));
    PyBuffer_Release(&data);
    return PyLong_FromLong(done);
}

PyDoc_STRVAR(put_doc, "put(into, where, nbytes, /)\n--\n\nSee hbone.openssl.");

static PyObject *put(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t value[3];
    if (!numbers(args, count, 3, value))
        return NULL;
    return PyLong_FromLong(tls.bio_write((void *)value[0], (void *)value[1], bounded(value[2])));
}

PyDoc_STRVAR(lend_doc, "lend(ssl, where, nbytes, out, /)\n--\n\nSee hbone.openssl.");

static PyObject *lend(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t value[4];
    if (!numbers(args, count, 4, value))
        return NULL;
    void *into = tls.bio_new_mem_buf((void *)value[1], bounded(value[2]));
    if (into == NULL)
        return PyErr_NoMemory();
    tls.bio_set_mem_eof_return(into, -1);
    tls.ssl_set_bio((void *)value[0], into, (void *)value[3]);
    return PyLong_FromSsize_t((Py_ssize_t)into);
}

PyDoc_STRVAR(take_doc, "take(out, where, room, /)\n--\n\nSee hbone.openssl.");

static PyObject *take(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t value[3];
    if (!numbers(args, count, 3, value))
        return NULL;
    return PyLong_FromLong(tls.bio_read((void *)value[0], (void *)value[1], bounded(value[2])));
}

PyDoc_STRVAR(pending_doc, "pending(into, nowhere, /)\n--\n\nSee hbone.openssl.");

static PyObject *pending(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    Py_ssize_t value[2];
    if (!numbers(args, count, 2, value))
        return NULL;
    return PyLong_FromLong(tls.bio_get_mem_data((void *)value[0], NULL));
}

static PyMethodDef functions[] = {
    {"poll", (PyCFunction)(void (*)(void))poll_events, METH_FASTCALL, poll_doc},
    {"use", (PyCFunction)(void (*)(void))use, METH_FASTCALL, use_doc},
    {"read_records", (PyCFunction)(void (*)(void))read_records, METH_FASTCALL, read_records_doc},
    {"write_records", (PyCFunction)(void (*)(void))write_records, METH_FASTCALL, write_records_doc},
    {"write_small", (PyCFunction)(void (*)(void))write_small, METH_FASTCALL, write_small_doc},
    {"put", (PyCFunction)(void (*)(void))put, METH_FASTCALL, put_doc},
    {"lend", (PyCFunction)(void (*)(void))lend, METH_FASTCALL, lend_doc},
    {"take", (PyCFunction)(void (*)(void))take, METH_FASTCALL, take_doc},
    {"pending", (PyCFunction)(void (*)(void))pending, METH_FASTCALL, pending_doc},
    {NULL, NULL, 0, NULL},
};

/* The sockets' class, and the slower methods of its base. */
static int add_socket(PyObject *module) {
    PyObject *library = PyImport_ImportModule("_socket");
    if (library == NULL)
        return -1;
    PyObject *base = PyObject_GetAttrString(library, "socket");
    Py_DECREF(library);
    if (base == NULL)
        return -1;
    PyObject *fileno = PyObject_GetAttrString(base, "fileno");
    slow_recv_into = PyObject_GetAttrString(base, "recv_into");
    slow_send = PyObject_GetAttrString(base, "send");
    PyObject *bases = PyTuple_Pack(1, base), *made = NULL;
    if (fileno != NULL && slow_recv_into != NULL && slow_send != NULL && bases != NULL) {
        if (Py_IS_TYPE(fileno, &PyMethodDescr_Type) && ((PyMethodDescrObject *)fileno)->d_method->ml_flags == METH_NOARGS) {
            socket_fileno = ((PyMethodDescrObject *)fileno)->d_method->ml_meth; /* of a class that is never freed */
            made = PyType_FromSpecWithBases(&socket_spec, bases);
        } else {
            PyErr_SetString(PyExc_ImportError, "a socket's fileno() is not what it was");
        }
    }
    Py_XDECREF(fileno);
    Py_XDECREF(bases);
    Py_DECREF(base);
    if (made == NULL)
        return -1;
    int failed = PyModule_AddObjectRef(module, "Socket", made);
    Py_DECREF(made);
    return failed;
}

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "hbone._native",
    .m_doc = "What the data path calls for each read and write.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    PyObject *names = Py_BuildValue("(ssssssssss)", "ERR_clear_error", "SSL_read", "SSL_write", "SSL_get_error",
                                    "BIO_read", "BIO_write", "BIO_get_mem_data", "BIO_new_mem_buf",
                                    "BIO_set_mem_eof_return", "SSL_set_bio");
    if (names == NULL || PyModule_AddObjectRef(module, "FUNCTIONS", names) < 0 || add_socket(module) < 0) {
        Py_XDECREF(names);
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(names);
    return module;
}
